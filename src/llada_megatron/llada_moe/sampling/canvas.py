"""What is being written: token rows of different lengths, their open positions, and the order of blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Canvas:
    """Rows padded on the right to one length; padding is a segment of its own that no text attends to.

    `open` alone says whether a position is to be filled: a mask token where it is false is text like any other.
    """

    tokens: Tensor
    """[batch, seq] int64; the mask token where open."""
    open: Tensor
    """[batch, seq] bool: still to be filled."""
    lengths: Tensor
    """[batch] int64: positions of each row that are not padding."""
    block: Tensor
    """[batch, seq] int64: number of the block that an open position belongs to, -1 elsewhere."""
    stream: Tensor
    """[batch] int64: which random draws a row uses; a row sampled alone with the same number draws the same."""

    @property
    def blocks(self) -> Tensor:
        """Number of blocks of each row `[batch]`."""
        return self.block.amax(1) + 1

    def boundaries(self, rows: Tensor) -> Tensor:
        """Attention segments `[segments + 1]` int32 of the batch made of these rows (see `model.patterns`)."""
        seq = self.tokens.shape[1]
        starts = torch.arange(len(rows)) * seq
        ends = starts + self.lengths[rows].cpu()
        return torch.cat([starts, ends, torch.tensor([len(rows) * seq])]).unique(sorted=True).to(torch.int32)

    def current(self) -> Tensor:
        """Open positions of the first unfinished block of each row: bool `[batch, seq]`."""
        number = self.block.masked_fill(~self.open, torch.iinfo(torch.int64).max)
        return self.open & (number == number.amin(1, keepdim=True))


def with_gaps(
    rows: Sequence[Sequence[int]], gaps: Sequence[Sequence[bool]], mask_id: int, block_length: int | None = None
) -> Canvas:
    """A canvas of rows whose positions with a true `gaps` are to be filled.

    Blocks hold `block_length` gaps each, left to right; None makes all gaps of a row one block.
    """
    lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
    seq = max(1, int(lengths.max())) if len(rows) else 1
    tokens = torch.full((len(rows), seq), mask_id, dtype=torch.int64)
    is_open = torch.zeros((len(rows), seq), dtype=torch.bool)
    for i, (row, gap) in enumerate(zip(rows, gaps, strict=True)):
        if len(row) != len(gap):
            raise ValueError(f"row {i}: {len(row)} tokens, but {len(gap)} gap flags")
        tokens[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        is_open[i, : len(row)] = torch.tensor(gap, dtype=torch.bool)
    tokens[is_open] = mask_id
    rank = is_open.cumsum(1) - 1
    block = (rank // (block_length or seq)).masked_fill(~is_open, -1)
    return Canvas(tokens, is_open, lengths, block, torch.arange(len(rows)))


def after_prompts(
    prompts: Sequence[Sequence[int]], new_tokens: int, mask_id: int, block_length: int | None = None
) -> Canvas:
    """A canvas that continues each prompt by `new_tokens` open positions, in blocks counted from the prompt's end."""
    rows = [[*prompt, *[mask_id] * new_tokens] for prompt in prompts]
    gaps = [[False] * len(prompt) + [True] * new_tokens for prompt in prompts]
    return with_gaps(rows, gaps, mask_id, block_length)
