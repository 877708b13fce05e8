"""Which set sample number n comes from, for any n, without counting up to it."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from llada_megatron.llada_moe.errors import ConfigError

RESOLUTION = 10_000
"""Longest cycle. Shares with a common denominator up to this are exact; others are rounded to multiples of 1/10000."""


class Blend:
    """Shares of several sets, exact over every cycle of `len(self)` samples and spread evenly inside it."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Relative weights, any positive scale. Raises ConfigError for one that cannot be met."""
        if not weights or any(not weight > 0 for weight in weights):
            raise ConfigError("data.sets: every weight must be above 0 (remove the set instead)")
        self.counts = _counts(weights)
        # The j-th of c samples of a set wants place (j + 1/2)/c of the cycle; ties go to the earlier set.
        wishes = sorted(((2 * j + 1) / (2 * c), k, j) for k, c in enumerate(self.counts) for j in range(c))
        self._sets = np.array([k for _, k, _ in wishes], np.int32)
        self._ranks = np.array([j for _, _, j in wishes], np.int64)

    def __len__(self) -> int:
        """Samples of one cycle."""
        return len(self._sets)

    def locate(self, number: int) -> tuple[int, int]:
        """Set of sample `number`, and how many samples of that set come before it."""
        cycle, place = divmod(number, len(self))
        chosen = int(self._sets[place])
        return chosen, cycle * self.counts[chosen] + int(self._ranks[place])

    @property
    def shares(self) -> list[float]:
        """The share of each set."""
        return [c / len(self) for c in self.counts]


def _counts(weights: Sequence[float]) -> list[int]:
    """Samples of each set in a cycle of at most RESOLUTION, in lowest terms."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    cycle = lcm(*(share.denominator for share in shares))
    if cycle > RESOLUTION:
        cycle = RESOLUTION
    counts = [int(share * cycle) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: (counts[k] - shares[k] * cycle, k))
    for k in by_remainder[: cycle - sum(counts)]:
        counts[k] += 1
    if 0 in counts:
        k = counts.index(0)
        raise ConfigError(
            f"data.sets[{k}].weight: {weights[k]:g} is under 1/{RESOLUTION} of the blend; raise it or remove the set"
        )
    common = gcd(*counts)
    return [c // common for c in counts]
