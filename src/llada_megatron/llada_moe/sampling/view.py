"""What a step sees of the sequences that take part in it: the stretch of each that can change now."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class View:
    """One row per sequence, one column per position from `first` on; all on the host.

    A row ends at its block's end; columns behind it are neither masked nor editable.
    """

    slot: Tensor
    """[rows] int64."""
    stream: Tensor
    """[rows] int64: see `Canvas`."""
    first: Tensor
    """[rows] int64: position of column 0: the block's start, or that of an earlier block which an editor may change."""
    start: Tensor
    """[rows] int64: where the current block begins."""
    end: Tensor
    """[rows] int64: where it ends."""
    length: Tensor
    """[rows] int64: positions of the sequence."""
    tokens: Tensor
    """[rows, columns] int64: what stands there; the mask token where masked."""
    masked: Tensor
    """[rows, columns] bool: open positions of the current block, of which the schedule chooses."""
    editable: Tensor
    """[rows, columns] bool: written positions of this and the reachable blocks, which an editor may change."""
    step: Tensor
    """[rows] int64: steps that the sequence has taken before this one."""
    step_in_block: Tensor
    """[rows] int64."""
    block: Tensor
    """[rows] int64: number of the current block."""
    blocks: Tensor
    """[rows] int64: blocks of the sequence."""
    masks: Tensor
    """[rows] int64: open positions of the current block at its first step."""

    @cached_property
    def positions(self) -> Tensor:
        """Of each column in its sequence, int64 `[rows, columns]`; those from the row's `end` on belong to no block."""
        return self.first[:, None] + torch.arange(self.tokens.shape[1])
