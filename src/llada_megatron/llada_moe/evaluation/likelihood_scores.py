"""From the log-likelihoods of answers to accuracies and bits, with their standard errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llada_megatron.llada_moe.evaluation.estimators import Estimate
from llada_megatron.llada_moe.evaluation.scored_lines import ScoredLine


def together(estimates: Sequence[Estimate]) -> Estimate:
    """The windows of one text as one estimate; their draws are independent of each other."""
    errors = [each.standard_error for each in estimates]
    error = None if None in errors else math.sqrt(math.fsum((e or 0.0) ** 2 for e in errors))
    strata = estimates[0].strata if len(estimates) == 1 else ()
    return Estimate(
        math.fsum(each.nats for each in estimates),
        error,
        sum(each.tokens for each in estimates),
        sum(each.queries for each in estimates),
        strata,
    )


def record_of(line: ScoredLine, estimates: Sequence[Estimate]) -> dict[str, Any]:
    """The JSON object of one line's result, one estimate for each of its answers."""
    sizes = [len(answer.encode()) if isinstance(answer, str) else None for answer in line.answers]
    found: dict[str, Any] = {
        "number": line.number,
        "nats": [each.nats for each in estimates],
        "standard_error": [each.standard_error for each in estimates],
        "tokens": [each.tokens for each in estimates],
        "bytes": sizes,
        "queries": sum(each.queries for each in estimates),
    }
    if line.id is not None:
        found["id"] = line.id
    if line.right is not None:
        nats = found["nats"]
        lengths = [len(answer) for answer in line.answers]
        found |= {
            "right": line.right,
            "acc": _best(nats) == line.right,
            "acc_norm": _best([n / max(1, length) for n, length in zip(nats, lengths, strict=True)]) == line.right,
            "margin_error": _margin_error(estimates),
        }
        found["margin"] = nats[_best(nats)] - max(n for i, n in enumerate(nats) if i != _best(nats))
    return found


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _margin_error(estimates: Sequence[Estimate]) -> float | None:
    """Standard error of the difference between the two best options, stratum by stratum.

    Under shared masks it is smaller than what the errors of both would give, since they rise and fall together. Where
    one is exact, as an option of one token is, it is the other's error.
    """
    first, second = sorted(estimates, key=lambda each: -each.nats)[:2]
    if 0.0 in (first.standard_error, second.standard_error):
        return second.standard_error if first.standard_error == 0.0 else first.standard_error
    if len(first.strata) != len(second.strata) or len(first.strata) < 2:
        return None
    differences = [a - b for a, b in zip(first.strata, second.strata, strict=True)]
    return statistics.stdev(differences) / math.sqrt(len(differences))


@dataclass(frozen=True)
class Figure:
    """A number and its standard error."""

    value: float
    error: float | None

    def __str__(self) -> str:
        """Both, as text."""
        return f"{self.value:.4f}" + (" (no standard error)" if self.error is None else f" ± {self.error:.4f}")


@dataclass(frozen=True)
class LikelihoodSummary:
    """What the lines of a file say together."""

    questions: int
    acc: Figure | None
    acc_norm: Figure | None
    undecided: int
    """Questions whose two best options differ by less than two standard errors, or by an unknown error."""
    texts: int
    nats_per_token: Figure | None
    bits_per_byte: Figure | None

    def record(self) -> dict[str, Any]:
        """As plain values."""
        values: dict[str, Any] = {}
        for name, value in vars(self).items():
            values[name] = {"value": value.value, "error": value.error} if isinstance(value, Figure) else value
        return values


def summarised(records: Iterable[dict[str, Any]]) -> LikelihoodSummary:
    """The summary of all records: accuracies of questions, and costs of other texts (positive; of the estimate)."""
    every = list(records)
    asked = [each for each in every if "right" in each]
    texts = [each for each in every if "right" not in each]
    unsure = [e for e in asked if e["margin_error"] is None or e["margin"] < 2 * e["margin_error"]]
    tokens = sum(each["tokens"][0] for each in texts)
    sizes = [each["bytes"][0] for each in texts]
    nats = -math.fsum(each["nats"][0] for each in texts)
    errors = [each["standard_error"][0] for each in texts]
    error = None if None in errors else math.sqrt(math.fsum(e * e for e in errors))
    known = texts and None not in sizes and sum(sizes) > 0
    return LikelihoodSummary(
        questions=len(asked),
        acc=_accuracy([each["acc"] for each in asked]),
        acc_norm=_accuracy([each["acc_norm"] for each in asked]),
        undecided=len(unsure),
        texts=len(texts),
        nats_per_token=_per(nats, error, tokens) if texts else None,
        bits_per_byte=_per(nats, error, sum(sizes) * math.log(2)) if known else None,
    )


def _accuracy(right: Sequence[bool]) -> Figure | None:
    """A share and its error over questions, as lm-evaluation-harness gives it."""
    if not right:
        return None
    share = sum(right) / len(right)
    return Figure(share, math.sqrt(share * (1 - share) / (len(right) - 1)) if len(right) > 1 else None)


def _per(nats: float, error: float | None, units: float) -> Figure:
    return Figure(nats / units, None if error is None else error / units)
