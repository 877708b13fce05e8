"""How evenly the tokens of a layer are spread over its experts: figures of one list of counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

OVERLOADED = 2.0
"""An expert is overloaded above this many times the mean number of tokens."""


@dataclass(frozen=True)
class ExpertBalance:
    """Balance of one layer. A layer without any token counts as even and wholly dead."""

    max_over_mean: float
    """Tokens of the busiest expert relative to the mean (1 = even)."""
    variation: float
    """Coefficient of variation: standard deviation over mean of the experts' tokens (0 = even)."""
    entropy: float
    """Entropy of the experts' shares over that of equal shares: 1 = even, 0 = one expert takes all."""
    dead: int
    """Experts without a token."""
    overloaded: int
    """Experts with more than `OVERLOADED` times the mean."""


def balance_of(counts: Sequence[int]) -> ExpertBalance:
    """Balance of a layer from the tokens of each expert, `[experts]`."""
    total, experts = sum(counts), len(counts)
    if total == 0:
        return ExpertBalance(1.0, 0.0, 1.0, experts, 0)
    mean = total / experts
    variance = sum((count - mean) ** 2 for count in counts) / experts
    nats = -sum(count / total * math.log(count / total) for count in counts if count)
    return ExpertBalance(
        max_over_mean=max(counts) / mean,
        variation=math.sqrt(variance) / mean,
        entropy=nats / math.log(experts) if experts > 1 else 1.0,
        dead=sum(count == 0 for count in counts),
        overloaded=sum(count > OVERLOADED * mean for count in counts),
    )
