"""From the answers of several trained models to the figures of the reversal benchmark, and what they are to show."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

AUTOREGRESSIVE, DIFFUSION, WHOLE_NAMES = "autoregressive", "diffusion", "whole-word diffusion"
ARMS = (AUTOREGRESSIVE, DIFFUSION, WHOLE_NAMES)
"""What the models learn; all else is equal."""
LEARNT, NEAR, CURSED, TIMES, ERRORS = 90.0, 5.0, 5.0, 5.0, 5.0
"""Goals: percent forward; points that the answers in place may be behind; percent reordered of the autoregressive
model; how many times that of it the diffusion model has, and by how many standard errors it is above chance."""

ROWS = {
    "forward": ("forward", None),
    "forward, description asked": ("forward", "description"),
    "forward, name asked": ("forward", "name"),
    "in place, name asked": ("in place", "name"),
    "reordered, name asked": ("reordered", "name"),
    "reordered, description asked": ("reordered", "description"),
}
"""What is reported: the order that is asked, and what for (None = either)."""
FORWARD, IN_PLACE, REORDERED = "forward", "in place, name asked", "reordered, name asked"


@dataclass(frozen=True)
class SeedFigures:
    """Of one row, one model and one seed. Shares are in percent."""

    asked: int
    right: float
    shuffled: float
    """Answers that are right for another fact, drawn at random: the control."""
    unknown: float
    """Wrong answers that no fact has: of names, parts of two put together."""
    commonest: float
    """The answer that is given most often."""
    margin: float | None
    """Mean log-likelihood of the right name less that of another, in nats."""


def seed_figures(answers: Sequence[Mapping[str, Any]]) -> dict[str, SeedFigures]:
    """The rows of one model of one seed, from the records of its answers."""
    return {
        row: _figures([each for each in answers if each["ask"] == ask and about in (None, each["about"])])
        for row, (ask, about) in ROWS.items()
    }


def _figures(answers: Sequence[Mapping[str, Any]]) -> SeedFigures:
    count = len(answers)
    margins = [each["margin"] for each in answers if each["margin"] is not None]

    def percent(number: int) -> float:
        return 100.0 * number / count

    return SeedFigures(
        asked=count,
        right=percent(sum(each["right"] for each in answers)),
        shuffled=percent(sum(each["shuffled"] for each in answers)),
        unknown=percent(sum(not each["known"] for each in answers)),
        commonest=percent(Counter(each["written"] for each in answers).most_common(1)[0][1]),
        margin=statistics.fmean(margins) if margins else None,
    )


@dataclass(frozen=True)
class OverSeeds:
    """A mean and its standard error over seeds, None for one seed."""

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> OverSeeds:
        """Of the values of the seeds."""
        several = len(values) > 1
        return cls(statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if several else None)

    def __str__(self) -> str:
        """Both, as text."""
        return f"{self.mean:.1f}" + ("" if self.error is None else f" ± {self.error:.1f}")


Found = Mapping[str, Mapping[int, Mapping[str, SeedFigures]]]
"""By arm, seed and row."""


def counting(found: Found) -> dict[str, list[int]]:
    """The seeds of each arm whose model has learnt what it was trained on; the others say nothing."""
    return {arm: [s for s, rows in seeds.items() if rows[FORWARD].right >= LEARNT] for arm, seeds in found.items()}


def over_seeds(found: Found, arm: str, row: str, figure: str = "right") -> OverSeeds | None:
    """A figure of the models that count; None if there is none."""
    values = [getattr(found[arm][seed][row], figure) for seed in counting(found)[arm]]
    known = [value for value in values if value is not None]
    return OverSeeds.of(known) if known else None


@dataclass(frozen=True)
class ReversalClaim:
    """A figure beside its goal; `holds` is None where there is no goal."""

    claim: str
    value: float
    unit: str
    goal: str
    holds: bool | None

    def to_dict(self) -> dict[str, Any]:
        """As in the JSON result."""
        return asdict(self) | {"value": self.value if math.isfinite(self.value) else None}


def reversal_claims(found: Found, facts: int) -> list[ReversalClaim]:
    """What the models are to show, of which nothing is known unless they have learnt the facts.

    Args:
        found: the figures.
        facts: of which one is right by chance.
    """
    claims = []
    for arm in ARMS:
        lowest = min(rows[FORWARD].right for rows in found[arm].values())
        claims.append(_claim(f"{arm}: forward, the lowest seed", lowest, "%", f">= {LEARNT:g}", lowest >= LEARNT))
    for arm in ARMS:
        behind = _mean(found, arm, FORWARD) - _mean(found, arm, IN_PLACE)
        claims.append(_claim(f"{arm}: in place behind forward", behind, "points", f"<= {NEAR:g}", behind <= NEAR))
    cursed, freed = _mean(found, AUTOREGRESSIVE, REORDERED), _mean(found, DIFFUSION, REORDERED)
    claims.append(_claim("autoregressive: reordered", cursed, "%", f"<= {CURSED:g}", cursed <= CURSED))
    goal = f">= {TIMES:g} x autoregressive"
    claims.append(_claim("diffusion: reordered", freed, "%", goal, freed >= TIMES * cursed and freed > 0))
    for arm in (DIFFUSION, WHOLE_NAMES):
        errors = _errors_above(over_seeds(found, arm, REORDERED), 100.0 / facts)
        goal = f"> {ERRORS:g}" if arm == DIFFUSION else "reported"
        holds = errors > ERRORS if arm == DIFFUSION else None
        claims.append(_claim(f"{arm}: reordered above chance", errors, "standard errors", goal, holds))
    claims.append(_claim(f"{WHOLE_NAMES}: reordered", _mean(found, WHOLE_NAMES, REORDERED), "%", "reported", None))
    return claims


def _mean(found: Found, arm: str, row: str) -> float:
    figure = over_seeds(found, arm, row)
    return math.nan if figure is None else figure.mean


def _errors_above(figure: OverSeeds | None, chance: float) -> float:
    """How far above chance, in standard errors over seeds; not a number where one seed alone cannot tell."""
    if figure is None or figure.error is None:
        return math.nan
    above = figure.mean - chance
    return above / figure.error if figure.error else math.copysign(math.inf, above)


def _claim(claim: str, value: float, unit: str, goal: str, holds: bool | None) -> ReversalClaim:
    return ReversalClaim(claim, value, unit, goal, None if holds is None else bool(holds))
