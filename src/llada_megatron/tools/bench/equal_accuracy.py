"""How much faster one sampler is than another where it is as accurate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Point(Protocol):
    """What a model did with one setting of its speed."""

    @property
    def tokens_per_forward(self) -> float:
        """Tokens written per forward pass."""

    @property
    def accuracy(self) -> float:
        """Share of the answers that are right."""


def speed_ratio(without: Sequence[Point], confident: Sequence[Point], equal: float) -> float:
    """The most tokens per forward pass of `confident` over the most `without`, where the accuracy is at most `equal`
    below the best without; 0 where `confident` has no such point."""
    least = max(point.accuracy for point in without) - equal
    return _fastest(confident, least) / _fastest(without, least)


def _fastest(points: Sequence[Point], least: float) -> float:
    return max((point.tokens_per_forward for point in points if point.accuracy >= least), default=0.0)
