"""Schedules that remember earlier steps: predictions that have stopped to change, slow and fast phases."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling.schedules.base import require_at_least, require_share, top
from llada_megatron.llada_moe.sampling.statistics import Need, Statistics
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock


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

    def start(self, slots: int, seq: int) -> _RunningStable:
        """See `Schedule`."""
        return _RunningStable(self, slots, seq)


class _RunningStable:
    """For how many steps each position has changed little."""

    def __init__(self, settings: Stable, slots: int, seq: int) -> None:
        self._settings = settings
        self._calm = torch.zeros(slots, seq + 1, dtype=torch.int64)  # the last column is that of no position

    def reach(self, view: ActiveBlock) -> Tensor | None:
        """See `Running`."""
        return None

    def select(self, statistics: Statistics, view: ActiveBlock) -> Tensor:
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


@dataclass(frozen=True)
class SlowFast:
    """Cycles of a slow and a fast phase (SlowFast sampling, arXiv 2506.10848), with the published code's settings.

    A block is written in cycles from left to right. In the slow phase, of a fixed number of steps, each step guesses
    how far the cycle reaches: to the farthest position whose confidence is at least `reach_confidence` (positional
    principle); the guess stands once it stays the same (convergence principle), else it is the mean of the last ones.
    In the fast phase only the cycle is written, and from its second step on the model does not see what lies behind
    it, which is an approximation. Both phases commit the predictions of at least `threshold` if they are several
    (certainty principle), and else the best one.
    """

    exploration: int = 6
    """Steps of the slow phase."""
    reach_confidence: float = 0.3
    threshold: float = 0.9
    window: int = 2
    """Guesses that are compared."""
    deviation: float = 1.0
    """They are the same if their standard deviation, in positions, lies below this."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: a setting out of range."""
        require_at_least("exploration", self.exploration, 1)
        require_share("reach_confidence", self.reach_confidence)
        require_share("threshold", self.threshold)
        require_at_least("window", self.window, 1)
        require_at_least("deviation", self.deviation, 0)

    @property
    def needs(self) -> Collection[Need]:
        """See `Schedule`."""
        return frozenset()

    def start(self, slots: int, seq: int) -> _RunningSlowFast:
        """See `Schedule`."""
        return _RunningSlowFast(self, slots)


class _RunningSlowFast:
    """Where the cycles of each slot stand; positions are counted from the start of the block."""

    def __init__(self, settings: SlowFast, slots: int) -> None:
        self._settings = settings
        zeros = torch.zeros(slots, dtype=torch.int64)
        self._low, self._high = zeros.clone(), zeros.clone()  # the cycle; its end counts once the slow phase is over
        self._slow_steps, self._fast_steps = zeros.clone(), zeros.clone()
        self._found = torch.zeros(slots, dtype=torch.bool)
        self._guesses = torch.zeros(slots, settings.window, dtype=torch.float64)  # the latest one last

    def reach(self, view: ActiveBlock) -> Tensor | None:
        """See `Running`."""
        self._begin_cycles(view)
        seen = view.start + self._high[view.slot]
        return torch.where(self._fast_steps[view.slot] > 0, seen, view.length)

    def select(self, statistics: Statistics, view: ActiveBlock) -> Tensor:
        """See `Running`."""
        self._begin_cycles(view)
        slot, offset = view.slot, _offset(view)
        slow = self._slow_steps[slot] < self._settings.exploration
        scope = view.masked & (offset >= self._low[slot][:, None])
        self._guess(statistics.confidence, scope, view, slow)
        self._slow_steps[slot] += slow.long()
        self._fast_steps[slot] += (~slow).long()
        scope = scope & (slow[:, None] | (offset < self._high[slot][:, None]))
        scope = torch.where(scope.any(1, keepdim=True), scope, view.masked)
        confident = scope & (statistics.confidence >= self._settings.threshold)
        several = confident.sum(1, keepdim=True) > 1
        return torch.where(several, confident, top(statistics.confidence, scope))

    def _begin_cycles(self, view: ActiveBlock) -> None:
        """Begin a block's first cycle, and the next one where a cycle is written; does nothing a second time."""
        slot, offset = view.slot, _offset(view)
        low, high = self._low[slot], self._high[slot]
        inside = (offset >= low[:, None]) & (offset < high[:, None])
        explored = self._slow_steps[slot] >= self._settings.exploration
        written = explored & ~(view.masked & inside).any(1)
        new_block = view.step_in_block == 0
        begin = written | new_block
        self._low[slot] = torch.where(new_block, 0, torch.where(written, high, low))
        for state in (self._slow_steps, self._fast_steps):
            state[slot] = state[slot].masked_fill(begin, 0)
        self._found[slot] &= ~begin

    def _guess(self, confidence: Tensor, scope: Tensor, view: ActiveBlock, slow: Tensor) -> None:
        """Guess the ends of the cycles that are being explored and not found yet."""
        slot, settings = view.slot, self._settings
        low, size = self._low[slot], view.end - view.start
        sure = scope & (confidence >= settings.reach_confidence)
        guess = torch.where(sure, _offset(view) + 1, low[:, None] + 1).amax(1)
        guess = torch.minimum(guess.clamp(min=1), size)
        guesses = torch.cat([self._guesses[slot, 1:], guess[:, None].double()], 1)
        count = (self._slow_steps[slot] + 1).clamp(max=settings.window)
        recent = torch.arange(settings.window) >= settings.window - count[:, None]
        mean = (guesses * recent).sum(1) / count
        deviation = (((guesses - mean[:, None]) ** 2 * recent).sum(1) / count).sqrt()
        same = (count == settings.window) & (deviation < settings.deviation)
        exploring = slow & ~self._found[slot]
        self._guesses[slot] = torch.where(exploring[:, None], guesses, self._guesses[slot])
        self._high[slot] = torch.where(exploring, torch.where(same, guess, mean.long()), self._high[slot])
        self._found[slot] |= exploring & same


def _offset(view: ActiveBlock) -> Tensor:
    """Of each column from the start of the current block: int64 `[rows, columns]`."""
    return view.positions - view.start[:, None]
