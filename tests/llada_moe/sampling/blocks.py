"""Active blocks and statistics made of plain lists."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling.statistics import Statistics
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock


def make_block(
    masked: Sequence[Sequence[bool]],
    start: Sequence[int] | int = 0,
    step: Sequence[int] | int = 0,
    step_in_block: Sequence[int] | int | None = None,
    slots: Sequence[int] | None = None,
    behind: int = 0,
) -> ActiveBlock:
    """Rows whose block is all of their columns, `behind` positions before the end of the sequence."""
    rows, columns = len(masked), len(masked[0])
    is_masked = torch.tensor(masked, dtype=torch.bool).view(rows, columns)

    def numbers(values: Sequence[int] | int) -> Tensor:
        return torch.tensor([values] * rows if isinstance(values, int) else list(values), dtype=torch.int64)

    first, slot = numbers(start), numbers(list(range(rows)) if slots is None else slots)
    return ActiveBlock(
        slot=slot,
        stream=slot,
        first=first,
        start=first,
        end=first + columns,
        length=first + columns + behind,
        tokens=torch.zeros(rows, columns, dtype=torch.int64),
        masked=is_masked,
        editable=torch.zeros_like(is_masked),
        step=numbers(step),
        step_in_block=numbers(step if step_in_block is None else step_in_block),
        index=numbers(0),
        block_count=numbers(1),
        masks=is_masked.sum(1),
    )


def make_statistics(
    confidence: Sequence[Sequence[float]],
    entropy: Sequence[Sequence[float]] | None = None,
    divergence: Sequence[Sequence[float]] | None = None,
) -> Statistics:
    """Statistics `[rows, columns]`."""
    of = torch.tensor(confidence, dtype=torch.float32)
    return Statistics(
        token=torch.zeros_like(of, dtype=torch.int64),
        confidence=of,
        entropy=None if entropy is None else torch.tensor(entropy, dtype=torch.float32),
        divergence=None if divergence is None else torch.tensor(divergence, dtype=torch.float32),
    )
