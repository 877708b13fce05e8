"""Schedules that remember earlier steps: predictions that have stopped changing, slow and fast phases."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling.schedules.schedule import require_at_least, require_share, top
from llada_megatron.llada_moe.sampling.statistics import Need, Statistics
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock


@dataclass(frozen=True)
class Stable:
    """Commit confident predictions that changed little in each of the last steps, else the most confident one.

    KLASS (arXiv 2511.05664): change is the Kullback-Leibler divergence of a position's distribution from the one in the
    step before. It is measured within a block; the published code also compares across the border of two blocks, which
    takes the logits of positions that are not sampled yet.
    """

    threshold: float = 0.9
    """Least probability of a prediction that is committed."""
    divergence: float = 0.01
    """Largest change in a step, in nats."""
    history: int = 2
    """Number of steps in which the change must be small."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: a setting out of range."""
        require_share("threshold", self.threshold)
        require_at_least("divergence", self.divergence, 0)
        require_at_least("history", self.history, 1)

    @property
    def needs(self) -> Collection[Need]:
        """Implements `Schedule.needs`."""
        return frozenset({"divergence"})

    def start(self, slots: int, seq: int) -> _RunningStable:
        """Implements `Schedule.start`."""
        return _RunningStable(self, slots, seq)


class _RunningStable:
    """Counts for each position the latest consecutive steps in which its prediction changed little."""

    def __init__(self, settings: Stable, slots: int, seq: int) -> None:
        self._settings = settings
        self._calm = torch.zeros(slots, seq + 1, dtype=torch.int64)  # the last column is for columns past the sequence

    def reach(self, block: ActiveBlock) -> Tensor | None:
        """Implements `RunningSchedule.reach`."""
        return None

    def select(self, statistics: Statistics, block: ActiveBlock) -> Tensor:
        """Implements `RunningSchedule.select`."""
        assert statistics.divergence is not None
        slot = block.slot[:, None]
        position = block.positions.clamp(max=self._calm.shape[1] - 1)
        little = statistics.divergence < self._settings.divergence  # false at the first step of a block: inf
        calm = (self._calm[slot, position] + 1) * little
        self._calm[slot, position] = calm
        ready = block.masked & (calm >= self._settings.history)
        ready &= statistics.confidence > self._settings.threshold
        return ready | (top(statistics.confidence, block.masked) & ~ready.any(1, keepdim=True))


@dataclass(frozen=True)
class SlowFast:
    """Cycles of a slow and a fast phase (SlowFast sampling, arXiv 2506.10848), with the published code's settings.

    A block is sampled in cycles from left to right. In the slow phase, of a fixed number of steps, each step guesses
    how far the cycle reaches: to the farthest position whose confidence is at least `reach_confidence` (positional
    principle). The guess is final once it stays the same (convergence principle); until then it is the mean of the last
    guesses. In the fast phase only positions of the cycle are committed, and from its second step on the model does not
    see what follows the cycle, which is an approximation. Both phases commit the predictions of at least `threshold` if
    there are several of them (certainty principle), and otherwise the best one.
    """

    exploration: int = 6
    """Steps of the slow phase."""
    reach_confidence: float = 0.3
    """Least confidence at the end of a cycle."""
    threshold: float = 0.9
    """Least confidence of predictions that are committed together."""
    window: int = 2
    """Number of latest guesses that are compared."""
    deviation: float = 1.0
    """Guesses count as the same if their standard deviation, in positions, is below this."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: a setting out of range."""
        require_at_least("exploration", self.exploration, 1)
        require_share("reach_confidence", self.reach_confidence)
        require_share("threshold", self.threshold)
        require_at_least("window", self.window, 1)
        require_at_least("deviation", self.deviation, 0)

    @property
    def needs(self) -> Collection[Need]:
        """Implements `Schedule.needs`."""
        return frozenset()

    def start(self, slots: int, seq: int) -> _RunningSlowFast:
        """Implements `Schedule.start`."""
        return _RunningSlowFast(self, slots)


class _RunningSlowFast:
    """The state of the cycles of each slot; positions are counted from the start of the block."""

    def __init__(self, settings: SlowFast, slots: int) -> None:
        self._settings = settings
        zeros = torch.zeros(slots, dtype=torch.int64)
        self._low, self._high = (
            zeros.clone(),
            zeros.clone(),
        )  # extent of the cycle; its end is used after the slow phase
        self._slow_steps, self._fast_steps = zeros.clone(), zeros.clone()
        self._found = torch.zeros(slots, dtype=torch.bool)
        self._guesses = torch.zeros(slots, settings.window, dtype=torch.float64)  # the latest one last

    def reach(self, block: ActiveBlock) -> Tensor | None:
        """Implements `RunningSchedule.reach`."""
        self._begin_cycles(block)
        seen = block.start + self._high[block.slot]
        return torch.where(self._fast_steps[block.slot] > 0, seen, block.length)

    def select(self, statistics: Statistics, block: ActiveBlock) -> Tensor:
        """Implements `RunningSchedule.select`."""
        self._begin_cycles(block)
        slot, offset = block.slot, _offset(block)
        slow = self._slow_steps[slot] < self._settings.exploration
        scope = block.masked & (offset >= self._low[slot][:, None])
        self._guess(statistics.confidence, scope, block, slow)
        self._slow_steps[slot] += slow.long()
        self._fast_steps[slot] += (~slow).long()
        scope = scope & (slow[:, None] | (offset < self._high[slot][:, None]))
        scope = torch.where(scope.any(1, keepdim=True), scope, block.masked)
        confident = scope & (statistics.confidence >= self._settings.threshold)
        several = confident.sum(1, keepdim=True) > 1
        return torch.where(several, confident, top(statistics.confidence, scope))

    def _begin_cycles(self, block: ActiveBlock) -> None:
        """Begin the first cycle of a new block, and the next cycle where one is complete.

        A second call in the same step changes nothing.
        """
        slot, offset = block.slot, _offset(block)
        low, high = self._low[slot], self._high[slot]
        inside = (offset >= low[:, None]) & (offset < high[:, None])
        explored = self._slow_steps[slot] >= self._settings.exploration
        written = explored & ~(block.masked & inside).any(1)
        new_block = block.step_in_block == 0
        begin = written | new_block
        self._low[slot] = torch.where(new_block, 0, torch.where(written, high, low))
        for state in (self._slow_steps, self._fast_steps):
            state[slot] = state[slot].masked_fill(begin, 0)
        self._found[slot] &= ~begin

    def _guess(self, confidence: Tensor, scope: Tensor, block: ActiveBlock, slow: Tensor) -> None:
        """Guess the ends of the cycles that are in their slow phase and have no final end yet."""
        slot, settings = block.slot, self._settings
        low, size = self._low[slot], block.end - block.start
        sure = scope & (confidence >= settings.reach_confidence)
        guess = torch.where(sure, _offset(block) + 1, low[:, None] + 1).amax(1)
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


def _offset(block: ActiveBlock) -> Tensor:
    """Offset of each column from the start of the current block: int64 `[rows, columns]`."""
    return block.positions - block.start[:, None]
