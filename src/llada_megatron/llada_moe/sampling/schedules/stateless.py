"""Schedules that remember nothing of earlier steps: by confidence, by entropy, by a fixed number of steps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling import draws
from llada_megatron.llada_moe.sampling.schedules.schedule import (
    Stateless,
    best,
    comparable,
    require_at_least,
    require_share,
    top,
)
from llada_megatron.llada_moe.sampling.statistics import Credit, Need, Statistics
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock


@dataclass(frozen=True)
class Threshold(Stateless):
    """Commit every prediction at least this probable, and the most probable one (Fast-dLLM, arXiv 2505.22618)."""

    threshold: float = 0.9

    def __post_init__(self) -> None:
        """Raises: ConfigError: no probability."""
        require_share("threshold", self.threshold)

    def select(self, statistics: Statistics, block: ActiveBlock) -> Tensor:
        """Implements `RunningSchedule.select`."""
        confident = block.masked & (statistics.confidence >= self.threshold)
        return confident | top(statistics.confidence, block.masked)


@dataclass(frozen=True)
class FlooredThreshold(Stateless):
    """Commit every prediction above a threshold, and at least so many that a block is finished in `steps` (LLaDA2).

    From the LLaDA2.0 report and its published sampler, where the positions of a block are shared evenly over the steps.
    LLaDA2.1 sets no number of steps, and commits at least the best prediction.
    """

    threshold: float = 0.95
    steps: int | None = 32
    """Largest number of steps of a block; None = no limit."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: no probability, or no step."""
        require_share("threshold", self.threshold)
        require_at_least("steps", self.steps, 1)

    def select(self, statistics: Statistics, block: ActiveBlock) -> Tensor:
        """Implements `RunningSchedule.select`."""
        confident = block.masked & (statistics.confidence > self.threshold)
        if self.steps is None:
            return confident | top(statistics.confidence, block.masked)
        size = block.end - block.start
        floor = (size // self.steps + (block.step_in_block < size % self.steps)).clamp(min=1)
        return confident | best(statistics.confidence, block.masked, floor)


@dataclass(frozen=True)
class Factor(Stateless):
    """Commit the n most confident predictions, for the largest n with (n + 1) (1 - confidence of the n-th) < factor.

    Fast-dLLM, arXiv 2505.22618, section 3.3. The published code differs from the formula, which is followed here: it
    also commits the last candidate if that is the first to fail.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        """Raises: ConfigError: a factor below 0."""
        require_at_least("factor", self.factor, 0)

    def select(self, statistics: Statistics, block: ActiveBlock) -> Tensor:
        """Implements `RunningSchedule.select`."""
        confidence = comparable(statistics.confidence, block.masked).sort(1, descending=True).values
        number = torch.arange(1, confidence.shape[1] + 1)
        passing = ((number + 1) * (1.0 - confidence) < self.factor).long().cumprod(1).sum(1)
        return best(statistics.confidence, block.masked, passing.clamp(min=1))


@dataclass(frozen=True)
class Hierarchical(Stateless):
    """Commit all predictions above `high`, and in every run of masks the best one if it is above `low`.

    dInfer, arXiv 2510.08666. Commits inside a long run of masks divide it, so that neighbours are rarely committed in
    the same step. The most confident prediction of all is always committed.
    """

    high: float = 0.92
    low: float = 0.62

    def __post_init__(self) -> None:
        """Raises: ConfigError: no probabilities."""
        require_share("high", self.high)
        require_share("low", self.low)

    def select(self, statistics: Statistics, block: ActiveBlock) -> Tensor:
        """Implements `RunningSchedule.select`."""
        confidence, masked = comparable(statistics.confidence, block.masked), block.masked
        begins = masked.clone()
        begins[:, 1:] &= ~masked[:, :-1]
        run = begins.cumsum(1) * masked  # number of the run, 0 = not masked
        rows, columns = masked.shape  # there are at most `columns` runs
        highest = confidence.new_full((rows, columns + 1), -torch.inf).scatter_reduce(1, run, confidence, "amax")
        is_best = masked & (confidence == highest.gather(1, run))
        column = torch.arange(columns).expand_as(run)
        first = run.new_full((rows, columns + 1), columns).scatter_reduce(
            1, run, column.masked_fill(~is_best, columns), "amin"
        )
        of_run = is_best & (column == first.gather(1, run)) & (confidence > self.low)
        return of_run | (masked & (confidence > self.high)) | top(confidence, masked)


@dataclass(frozen=True)
class CreditThreshold(Stateless):
    """A threshold on predictions that gain weight while the model repeats them (credit; dInfer, arXiv 2510.08666).

    In each step the most probable token of a position gains a credit of its probability ** gamma, earlier credits decay
    by the factor beta, and the logits rise by alpha * log(1 + credit). `step_cache.Credit` keeps it.
    """

    threshold: float = 0.8
    alpha: float = 0.7
    beta: float = 0.8
    gamma: float = 0.2

    def __post_init__(self) -> None:
        """Raises: ConfigError: a setting out of range."""
        require_share("threshold", self.threshold)
        require_share("beta", self.beta)
        require_at_least("alpha", self.alpha, 0)
        require_at_least("gamma", self.gamma, 0)

    @property
    def needs(self) -> Collection[Need]:  # type: ignore[override]
        """Implements `Schedule.needs`."""
        return frozenset({Credit(self.alpha, self.beta, self.gamma)})

    def select(self, statistics: Statistics, block: ActiveBlock) -> Tensor:
        """Implements `RunningSchedule.select`."""
        return Threshold(self.threshold).select(statistics, block)


@dataclass(frozen=True)
class EntropyBound(Stateless):
    """Commit as many of the best predictions as have entropies that, without the largest, sum to at most gamma.

    The EB-Sampler (arXiv 2505.24857): the sum bounds the mutual information of the predictions. With gamma 0 a step
    commits one position, and with an infinite one all of them.
    """

    gamma: float = 0.1
    """The bound, in nats."""
    order: Literal["entropy", "confidence"] = "entropy"
    """Whether the best predictions are those of lowest entropy or of highest confidence."""
    needs = frozenset[Need]({"entropy"})

    def __post_init__(self) -> None:
        """Raises: ConfigError: a bound below 0."""
        require_at_least("gamma", self.gamma, 0)

    def select(self, statistics: Statistics, block: ActiveBlock) -> Tensor:
        """Implements `RunningSchedule.select`."""
        entropy = statistics.entropy
        assert entropy is not None
        priority = -entropy if self.order == "entropy" else statistics.confidence
        ranked = comparable(priority, block.masked).argsort(dim=1, descending=True, stable=True)
        sums = entropy.double().nan_to_num(nan=1e30).gather(1, ranked)
        within = (sums.cumsum(1) - sums.cummax(1).values) <= self.gamma
        return best(priority, block.masked, within.long().cumprod(1).sum(1).clamp(min=1))


@dataclass(frozen=True)
class FixedSteps(Stateless):
    """The sampler of the LLaDA paper (arXiv 2502.09992, algorithms 4 and 5): a fixed number of steps.

    `steps` are divided evenly among the blocks of a sequence, and the masks of a block evenly among its steps; where a
    division leaves a remainder, the first ones take one more. A block takes at least one step, and never more than it
    has masks.
    """

    steps: int | None = None
    """Steps of a sequence; None = one per token."""
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    """Which predictions are committed: the most confident ones, or random ones."""
    seed: int = 0
    """Seed of the random choice."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: no step at all."""
        require_at_least("steps", self.steps, 1)

    def select(self, statistics: Statistics, block: ActiveBlock) -> Tensor:
        """Implements `RunningSchedule.select`."""
        priority = statistics.confidence
        if self.remasking == "random":
            names = (block.stream[:, None], block.step[:, None], block.positions)
            priority = draws.uniform(self.seed, draws.REMASKING, *names)
        return best(priority, block.masked, self._commits(block))

    def _commits(self, block: ActiveBlock) -> Tensor:
        """How many positions each row commits in this step, int64 `[rows]`."""
        if self.steps is None:
            return torch.ones_like(block.masks)
        blocks = block.block_count.clamp(min=1)
        steps = (self.steps // blocks + (block.index < self.steps % blocks)).clamp(min=1)
        steps = torch.minimum(steps, block.masks.clamp(min=1))
        return (block.masks // steps + (block.step_in_block < block.masks % steps)).clamp(min=1)


@dataclass(frozen=True)
class RandomSteps(FixedSteps):
    """Fixed steps that commit random positions: the plain reverse process of the LLaDA paper (algorithm 4)."""

    remasking: Literal["low_confidence", "random"] = "random"
