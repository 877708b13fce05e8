"""A mean with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_with_error(values: Sequence[float]) -> dict[str, float | None]:
    """A mean, and its standard error over what it is a mean of; None where there is only one."""
    count = max(1, len(values))
    mean = math.fsum(values) / count
    squares = math.fsum((value - mean) ** 2 for value in values)
    return {"value": mean, "error": math.sqrt(squares / (count - 1) / count) if count > 1 else None}
