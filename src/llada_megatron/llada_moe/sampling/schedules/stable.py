"""Commits of predictions that have stopped to change."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling.schedules.base import require_at_least, require_share, top
from llada_megatron.llada_moe.sampling.statistics import Need, Statistics
from llada_megatron.llada_moe.sampling.view import View


@dataclass(frozen=True)
class Stable:
    """Commit confident predictions that changed little in each of the last steps, else the most confident one.

    KLASS (arXiv 2511.05664): change is the Kullback-Leibler divergence of a position's distribution from the one in the
    step before. It is followed inside of a block; the published code also compares across the border of two blocks,
    which takes the logits of positions that are not written yet.
    """

    threshold: float = 0.9
    divergence: float = 0.01
    """Nats."""
    history: int = 2
    """Steps."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: a setting out of range."""
        require_share("threshold", self.threshold)
        require_at_least("divergence", self.divergence, 0)
        require_at_least("history", self.history, 1)

    @property
    def needs(self) -> Collection[Need]:
        """See `Schedule`."""
        return frozenset({"divergence"})

    def start(self, slots: int, seq: int) -> _Following:
        """See `Schedule`."""
        return _Following(self, slots, seq)


class _Following:
    """For how many steps each position has changed little."""

    def __init__(self, settings: Stable, slots: int, seq: int) -> None:
        self._settings = settings
        self._calm = torch.zeros(slots, seq + 1, dtype=torch.int64)  # the last column is that of no position

    def reach(self, view: View) -> Tensor | None:
        """See `Running`."""
        return None

    def select(self, statistics: Statistics, view: View) -> Tensor:
        """See `Running`."""
        assert statistics.divergence is not None
        slot = view.slot[:, None]
        position = view.positions.clamp(max=self._calm.shape[1] - 1)
        little = statistics.divergence < self._settings.divergence  # false where a block begins: inf
        calm = (self._calm[slot, position] + 1) * little
        self._calm[slot, position] = calm
        ready = view.masked & (calm >= self._settings.history)
        ready &= statistics.confidence > self._settings.threshold
        return ready | (top(statistics.confidence, view.masked) & ~ready.any(1, keepdim=True))
