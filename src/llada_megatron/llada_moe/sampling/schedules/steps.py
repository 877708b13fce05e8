"""As many commits in each step as were fixed beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling import draws
from llada_megatron.llada_moe.sampling.schedules.base import Stateless, best, require_at_least
from llada_megatron.llada_moe.sampling.statistics import Statistics
from llada_megatron.llada_moe.sampling.view import View


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

    def select(self, statistics: Statistics, view: View) -> Tensor:
        """See `Running`."""
        priority = statistics.confidence
        if self.remasking == "random":
            names = (view.stream[:, None], view.step[:, None], view.positions)
            priority = draws.uniform(self.seed, draws.REMASKING, *names)
        return best(priority, view.masked, self._commits(view))

    def _commits(self, view: View) -> Tensor:
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
