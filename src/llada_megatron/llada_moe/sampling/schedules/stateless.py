"""Schedules that remember nothing of earlier steps: by confidence, by entropy, by a fixed number of steps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling import row_memory
from llada_megatron.llada_moe.sampling.schedules.base import (
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

    def select(self, statistics: Statistics, view: ActiveBlock) -> Tensor:
        """See `Running`."""
        confident = view.masked & (statistics.confidence >= self.threshold)
        return confident | top(statistics.confidence, view.masked)


@dataclass(frozen=True)
class FlooredThreshold(Stateless):
    """Commit every prediction more probable than this, and so many of the best that `steps` finish a block (LLaDA2).

    From the LLaDA2.0 report and its published sampler, where the positions of a block are shared evenly over the steps.
    LLaDA2.1 has no such number: at least the best one is committed.
    """

    threshold: float = 0.95
    steps: int | None = 32
    """Of a block; None = as many as it takes."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: no probability, or no step."""
        require_share("threshold", self.threshold)
        require_at_least("steps", self.steps, 1)

    def select(self, statistics: Statistics, view: ActiveBlock) -> Tensor:
        """See `Running`."""
        confident = view.masked & (statistics.confidence > self.threshold)
        if self.steps is None:
            return confident | top(statistics.confidence, view.masked)
        size = view.end - view.start
        floor = (size // self.steps + (view.step_in_block < size % self.steps)).clamp(min=1)
        return confident | best(statistics.confidence, view.masked, floor)


@dataclass(frozen=True)
class Factor(Stateless):
    """Commit the n most confident ones for the largest n with (n + 1) (1 - confidence of the n-th) < factor.

    Fast-dLLM, arXiv 2505.22618, section 3.3. The published code also commits the last candidate where it is the first
    to fail; this is the formula.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        """Raises: ConfigError: a factor below 0."""
        require_at_least("factor", self.factor, 0)

    def select(self, statistics: Statistics, view: ActiveBlock) -> Tensor:
        """See `Running`."""
        confidence = comparable(statistics.confidence, view.masked).sort(1, descending=True).values
        number = torch.arange(1, confidence.shape[1] + 1)
        passing = ((number + 1) * (1.0 - confidence) < self.factor).long().cumprod(1).sum(1)
        return best(statistics.confidence, view.masked, passing.clamp(min=1))


@dataclass(frozen=True)
class Hierarchical(Stateless):
    """Commit all above `high`, and of every run of masks the best if it is above `low` (dInfer, arXiv 2510.08666).

    So a long run is divided by what is committed in its middle, and neighbours are rarely committed in one step. The
    most confident one of all is always committed.
    """

    high: float = 0.92
    low: float = 0.62

    def __post_init__(self) -> None:
        """Raises: ConfigError: no probabilities."""
        require_share("high", self.high)
        require_share("low", self.low)

    def select(self, statistics: Statistics, view: ActiveBlock) -> Tensor:
        """See `Running`."""
        confidence, masked = comparable(statistics.confidence, view.masked), view.masked
        begins = masked.clone()
        begins[:, 1:] &= ~masked[:, :-1]
        run = begins.cumsum(1) * masked  # 0 = not masked
        rows, columns = masked.shape  # at most as many runs, and number 0
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
    """A threshold on predictions that gain weight while the model keeps to them (credit; dInfer, arXiv 2510.08666).

    Of each row and step the likeliest token gains its probability ** gamma of credit, all earlier credit fading by
    beta; the logits then rise by alpha * log(1 + credit). See `statistics.Credit`.
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
        """See `Schedule`."""
        return frozenset({Credit(self.alpha, self.beta, self.gamma)})

    def select(self, statistics: Statistics, view: ActiveBlock) -> Tensor:
        """See `Running`."""
        return Threshold(self.threshold).select(statistics, view)


@dataclass(frozen=True)
class EntropyBound(Stateless):
    """Commit the longest run of best predictions whose entropies, without the largest, sum to at most gamma.

    The EB-Sampler (arXiv 2505.24857): this sum bounds what the predictions can say of each other. With gamma 0 one
    position is committed in a step, without a bound all of them.
    """

    gamma: float = 0.1
    """Nats."""
    order: Literal["entropy", "confidence"] = "entropy"
    """What makes a prediction a good one: low entropy, or high confidence."""
    needs = frozenset[Need]({"entropy"})

    def __post_init__(self) -> None:
        """Raises: ConfigError: a bound below 0."""
        require_at_least("gamma", self.gamma, 0)

    def select(self, statistics: Statistics, view: ActiveBlock) -> Tensor:
        """See `Running`."""
        entropy = statistics.entropy
        assert entropy is not None
        priority = -entropy if self.order == "entropy" else statistics.confidence
        ranked = comparable(priority, view.masked).argsort(dim=1, descending=True, stable=True)
        sums = entropy.double().nan_to_num(nan=1e30).gather(1, ranked)
        within = (sums.cumsum(1) - sums.cummax(1).values) <= self.gamma
        return best(priority, view.masked, within.long().cumprod(1).sum(1).clamp(min=1))


@dataclass(frozen=True)
class FixedSteps(Stateless):
    """The sampler of the LLaDA paper (arXiv 2502.09992, algorithms 4 and 5): a block's masks shared out over its steps.

    `steps` are shared evenly over a row's blocks, and a block's masks evenly over its steps; where a division leaves a
    rest, the first ones take one more. A block takes at least one step and never more than it has masks.
    """

    steps: int | None = None
    """Of a sequence; None = one per token."""
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    """Which predictions stay: the most confident ones, or random ones."""
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises: ConfigError: no step at all."""
        require_at_least("steps", self.steps, 1)

    def select(self, statistics: Statistics, view: ActiveBlock) -> Tensor:
        """See `Running`."""
        priority = statistics.confidence
        if self.remasking == "random":
            names = (view.stream[:, None], view.step[:, None], view.positions)
            priority = row_memory.uniform(self.seed, row_memory.REMASKING, *names)
        return best(priority, view.masked, self._commits(view))

    def _commits(self, view: ActiveBlock) -> Tensor:
        """How many positions each row commits in this step `[rows]`."""
        if self.steps is None:
            return torch.ones_like(view.masks)
        blocks = view.blocks.clamp(min=1)
        steps = (self.steps // blocks + (view.block < self.steps % blocks)).clamp(min=1)
        steps = torch.minimum(steps, view.masks.clamp(min=1))
        return (view.masks // steps + (view.step_in_block < view.masks % steps)).clamp(min=1)


@dataclass(frozen=True)
class RandomSteps(FixedSteps):
    """The same in random order: the paper's plain reverse process (algorithm 4)."""

    remasking: Literal["low_confidence", "random"] = "random"
