"""Which of the open positions are committed in a step."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling import draws
from llada_megatron.llada_moe.sampling.statistics import Need, Statistics
from llada_megatron.llada_moe.sampling.view import View


class Running(Protocol):
    """A schedule at work on one group of slots; what it remembers of them is its own."""

    def reach(self, view: View) -> Tensor | None:
        """Where the model stops looking in this step, int64 `[rows]`; None = nowhere before the row's end."""
        ...

    def select(self, statistics: Statistics, view: View) -> Tensor:
        """Positions to commit: bool `[rows, columns]`, at least one of every row that has masked ones, all masked.

        `statistics` is `[rows, columns]`; only what it says of asked positions (masked, editable) counts.
        """
        ...


class Schedule(Protocol):
    """Settings of a rule that chooses the positions to commit."""

    @property
    def needs(self) -> Collection[Need]:
        """Statistics that the rule reads beside token and confidence."""
        ...

    def start(self, slots: int, seq: int) -> Running:
        """The rule at work on sequences of up to `seq` positions in `slots` slots.

        A slot whose row in a view is at `step` 0 holds a new sequence: what was remembered of it counts no more.
        """
        ...


class Stateless:
    """A schedule that remembers nothing is at work as it is."""

    needs: Collection[Need] = frozenset()

    def start(self, slots: int, seq: int) -> Running:
        """See `Schedule`."""
        return self  # type: ignore[return-value]

    def reach(self, view: View) -> Tensor | None:
        """See `Running`."""
        return None


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

    def select(self, statistics: Statistics, view: View) -> Tensor:
        """See `Running`."""
        priority = statistics.confidence
        if self.remasking == "random":
            positions = view.first[:, None] + torch.arange(view.masked.shape[1])
            priority = draws.uniform(self.seed, draws.REMASKING, view.stream[:, None], view.step[:, None], positions)
        return best(priority, view.masked, self._commits(view))

    def _commits(self, view: View) -> Tensor:
        """How many positions each row commits in this step `[rows]`."""
        if self.steps is None:
            return torch.ones_like(view.masks)
        blocks = view.blocks.clamp(min=1)
        steps = (self.steps // blocks + (view.block < self.steps % blocks)).clamp(min=1)
        steps = torch.minimum(steps, view.masks.clamp(min=1))
        return view.masks // steps + (view.step_in_block < view.masks % steps)


@dataclass(frozen=True)
class Threshold(Stateless):
    """Commit every prediction at least this probable, and the most probable one (Fast-dLLM, arXiv 2505.22618)."""

    threshold: float = 0.9

    def select(self, statistics: Statistics, view: View) -> Tensor:
        """See `Running`."""
        confident = view.masked & (statistics.confidence >= self.threshold)
        return confident | best(statistics.confidence, view.masked, torch.ones_like(view.slot))


def best(priority: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` `[rows]` positions of highest priority among some, the leftmost of equals; all `[rows, columns]`."""
    ranked = priority.double().masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(ranked).scatter_(1, ranked, torch.arange(ranked.shape[1]).expand_as(ranked))
    return among & (rank < count[:, None])
