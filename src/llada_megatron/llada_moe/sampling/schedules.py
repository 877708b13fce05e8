"""Which of the open positions are committed in a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling import draws
from llada_megatron.llada_moe.sampling.statistics import Statistics


@dataclass(frozen=True)
class Progress:
    """Where the rows of a batch are; each int64 `[batch]`."""

    stream: Tensor
    step: Tensor
    """Steps that the row has taken."""
    step_in_block: Tensor
    block: Tensor
    blocks: Tensor
    """Blocks of the row."""
    masks: Tensor
    """Open positions of the current block at its first step."""


class Schedule(Protocol):
    """Chooses the positions to commit. It must choose at least one of every row that has candidates."""

    def select(self, statistics: Statistics, candidates: Tensor, progress: Progress) -> Tensor:
        """Positions to commit.

        Args:
            statistics: `[rows]`, of the candidates in order of (sequence, position).
            candidates: bool `[batch, seq]`.
            progress: of each row of the batch.

        Returns:
            bool `[batch, seq]`, a part of `candidates`.
        """
        ...


@dataclass(frozen=True)
class FixedSteps:
    """The sampler of the LLaDA paper (arXiv 2502.09992, algorithms 4 and 5): a block's masks shared out over its steps.

    `steps` are shared evenly over a row's blocks, and a block's masks evenly over its steps; where a division leaves a
    rest, the first ones take one more. A block takes at least one step and never more than it has masks.
    """

    steps: int
    remasking: Literal["low_confidence", "random"] = "low_confidence"
    """Which predictions stay: the most confident ones, or random ones."""
    seed: int = 0

    def select(self, statistics: Statistics, candidates: Tensor, progress: Progress) -> Tensor:
        """See `Schedule`."""
        priority = torch.full(candidates.shape, -torch.inf, dtype=torch.float64, device=candidates.device)
        if self.remasking == "random":
            positions = torch.arange(candidates.shape[1], device=candidates.device)
            chance = draws.uniform(
                self.seed, draws.REMASKING, progress.stream[:, None], progress.step[:, None], positions
            )
            priority[candidates] = chance[candidates]
        else:
            priority[candidates] = statistics.confidence.double()
        order = priority.argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        return candidates & (rank < self._commits(progress)[:, None])

    def _commits(self, progress: Progress) -> Tensor:
        """How many positions each row commits in this step `[batch]`."""
        blocks = progress.blocks.clamp(min=1)
        steps = (self.steps // blocks + (progress.block < self.steps % blocks)).clamp(min=1)
        steps = torch.minimum(steps, progress.masks.clamp(min=1))
        return progress.masks // steps + (progress.step_in_block < progress.masks % steps)
