"""What a benchmark states: a claim, the figure measured in this run, and whether it reaches its goal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Claim:
    """One row of the result. `holds` is None where a figure is reported without a goal."""

    claim: str
    value: float
    unit: str
    goal: str
    holds: bool | None

    def to_dict(self) -> dict[str, Any]:
        """The row as it stands in the JSON result."""
        return asdict(self)


def at_least(claim: str, value: float, unit: str, goal: float) -> Claim:
    """A figure that should not be smaller than its goal."""
    return Claim(claim, value, unit, f">= {goal:g}", bool(value >= goal))


def at_most(claim: str, value: float, unit: str, goal: float) -> Claim:
    """A figure that should not be larger than its goal (a value that is not a number never holds)."""
    return Claim(claim, value, unit, f"<= {goal:g}", bool(value <= goal))


def reported(claim: str, value: float, unit: str) -> Claim:
    """A figure without a goal."""
    return Claim(claim, value, unit, "reported", None)


def format_table(claims: Sequence[Claim]) -> str:
    """The claims as aligned plain text: verdict, value with unit, goal, claim."""
    words = {True: "holds", False: "FAILS", None: ""}
    rows = [("", "measured", "goal", "claim")]
    rows += [(words[c.holds], f"{c.value:.4g} {c.unit}".strip(), c.goal, c.claim) for c in claims]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in rows)
