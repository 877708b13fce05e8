"""The figures of candidates that answer the same prompts in turns, and a table of them."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from llada_megatron.console import message
from llada_megatron.tools.bench.sampling.candidates import Candidate, Generated
from llada_megatron.tools.bench.sampling.language import Language, Score


@dataclass(frozen=True)
class Figures:
    """What a candidate did with all prompts."""

    candidate: Candidate
    seconds: float
    """CPU seconds of a sequence."""
    answers: list[Generated]
    scores: list[Score]

    @cached_property
    def forwards(self) -> float:
        """Forward passes that a sequence took part in."""
        return self._mean([answer.work.forwards for answer in self.answers])

    @cached_property
    def forwards_per_token(self) -> float:
        """Forward passes over tokens before the end of text; infinite where there are none."""
        tokens = self._mean([score.tokens for score in self.scores])
        return self.forwards / tokens if tokens else math.inf

    @cached_property
    def positions(self) -> float:
        """Positions that ran through the layers for a sequence."""
        return self._mean([answer.work.positions for answer in self.answers])

    @cached_property
    def logit_rows(self) -> float:
        """Rows of logits that were computed for a sequence."""
        return self._mean([answer.work.logit_rows for answer in self.answers])

    @cached_property
    def right(self) -> float:
        """Share of the sentences that are right."""
        return self._mean([score.right for score in self.scores])

    @cached_property
    def right_error(self) -> float | None:
        """Standard error of `right` over prompts; None with one prompt."""
        values = [score.right for score in self.scores]
        return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None

    @cached_property
    def ends(self) -> float:
        """Share of the texts that end where they should."""
        return self._mean([score.ends for score in self.scores])

    def _mean(self, values: Sequence[float]) -> float:
        return sum(values) / len(values)


def measure(
    candidates: Sequence[Candidate],
    prompts: Sequence[list[int]],
    language: Language,
    rounds: int,
    together: int,
    quiet: bool = False,
) -> dict[str, Figures]:
    """Let every candidate answer every prompt in every round.

    They take turns after every few prompts, and each of them is the first in some turn, so that each meets the same
    load of the machine. Of the CPU seconds of the same prompts in several rounds the least count: other work only adds
    to them.

    Args:
        candidates: those that take part.
        prompts: what is to be continued.
        language: of the prompts; it judges the answers.
        rounds: how often all prompts are answered.
        together: prompts of a turn, given to a candidate in one call.
        quiet: say nothing of the progress.
    """
    turns = range(0, len(prompts), together)
    least: dict[tuple[str, int], float] = {}
    answers: dict[tuple[str, int], list[Generated]] = {}
    for number in range(rounds):
        for turn, first in enumerate(turns):
            at = (number * len(turns) + turn) % len(candidates)
            for candidate in [*candidates[at:], *candidates[:at]]:
                key = candidate.name, first
                start = time.process_time()
                answers[key] = candidate.write(prompts[first : first + together])
                least[key] = min(least.get(key, float("inf")), time.process_time() - start)
            if not quiet:
                message(f"round {number + 1}/{rounds}: {min(first + together, len(prompts))}/{len(prompts)} prompts")
    return {
        candidate.name: _figures(
            candidate,
            sum(least[candidate.name, first] for first in turns) / len(prompts),
            [answer for first in turns for answer in answers[candidate.name, first]],
            prompts,
            language,
        )
        for candidate in candidates
    }


def _figures(
    candidate: Candidate, seconds: float, answers: list[Generated], prompts: Sequence[list[int]], language: Language
) -> Figures:
    scores = [language.score(prompt, answer.tokens) for prompt, answer in zip(prompts, answers, strict=True)]
    return Figures(candidate, seconds, answers, scores)


def same_tokens(ours: Figures, theirs: Figures, end: int | None = None) -> float:
    """Share of the sequences with the same tokens; with `end` only those up to the first such token count."""

    def text(answer: Generated) -> list[int]:
        known = end is not None and end in answer.tokens
        return answer.tokens[: answer.tokens.index(end) + 1] if known else answer.tokens

    pairs = list(zip(ours.answers, theirs.answers, strict=True))
    return sum(text(one) == text(other) for one, other in pairs) / len(pairs)


_HEADINGS = (
    "sampler", "CPU s", "times as fast", "forwards", "forwards / token", "positions run", "logit rows", "right", "ends",
)  # fmt: skip


def table(figures: Sequence[Figures], reference: Figures) -> str:
    """A Markdown table with a line for each, the fastest first; all but the shares and the ratio are of a sequence."""
    rows = [_HEADINGS, tuple("---:" if at else "---" for at in range(len(_HEADINGS)))]
    rows += [_row(each, reference) for each in sorted(figures, key=lambda each: each.seconds)]
    widths = [max(len(row[at]) for row in rows) for at in range(len(_HEADINGS))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(row[at].rjust(widths[at]) for at in range(1, len(row)))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _row(each: Figures, reference: Figures) -> tuple[str, ...]:
    return (
        each.candidate.name,
        f"{each.seconds:.3f}",
        f"{reference.seconds / each.seconds:.1f}",
        f"{each.forwards:.1f}",
        f"{each.forwards_per_token:.3f}",
        f"{each.positions:,.0f}",
        f"{each.logit_rows:,.0f}",
        f"{each.right:.3f}",
        f"{each.ends:.2f}",
    )
