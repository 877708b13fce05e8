"""Numbers as the report writes them: always with their standard error, or with the word that there is none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

NONE = "–"
"""What stands where there is no value."""


def number(value: Any, digits: int = 4) -> str:
    """A number with so many significant digits; `not a number` for NaN and null, as the files have it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NONE if value is None else str(value)
    if not math.isfinite(value):
        return "not a number"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}g}"


def with_error(value: Any, error: Any, scale: float = 1.0) -> str:
    """A value and its standard error."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "not a number" if isinstance(value, float) else NONE
    known = isinstance(error, int | float) and math.isfinite(error)
    return f"{value * scale:.4f}" + (f" ± {error * scale:.4f}" if known else " (no standard error)")


def flat(protocol: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """The settings of a protocol as name and value, those inside others as `sampling.preset`."""
    for name, value in protocol.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{name}.")
        else:
            yield before + name, NONE if value is None else str(value)
