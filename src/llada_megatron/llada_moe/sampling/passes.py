"""One forward pass over a group of sequences: the packed tokens, and the positions whose logits are computed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llada_megatron.llada_moe.model.windows import Window
from llada_megatron.llada_moe.sampling.caches import CachePlan
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock, LogitRows, TokenBuffer


@dataclass(frozen=True)
class Pass:
    """The input of a forward pass. All tensors are on the host."""

    tokens: Tensor
    """[total] int64: token ids of all windows, packed."""
    windows: list[Window]
    """The parts of sequences that make up `total`, in this order. With guidance the second half of them repeats the
    first one without the given text (the unconditional rows)."""
    output_mask: Tensor
    """[total] bool: positions whose logits are computed."""
    rows: LogitRows
    """What identifies the rows of logits, in order, without the unconditional ones."""
    offsets: Tensor
    """[rows] int64: offset of each row of logits in the flattened active block."""

    @property
    def positions(self) -> Tensor:
        """Positions of the tokens in their sequences: `[total]` int64."""
        return torch.cat([window.positions for window in self.windows])

    def totals(self, rows: int) -> Tensor:
        """Positions that run for each row of the active block, its unconditional row included: int64 `[rows]`."""
        return torch.tensor([window.total for window in self.windows]).view(-1, rows).sum(0)

    @classmethod
    def idle(cls, mask_id: int) -> Pass:
        """A pass over one token without logits, for a rank without work that must take part in the expert exchange."""
        none = torch.zeros(0, dtype=torch.int64)
        rows = LogitRows(none, none, none, none, none)
        return cls(torch.tensor([mask_id]), [Window(0, 0, 1, 1)], torch.zeros(1, dtype=torch.bool), rows, none)


def pack(
    buffer: TokenBuffer,
    block: ActiveBlock,
    plan: CachePlan,
    wanted: Tensor,
    shadow: bool,
    guided: bool,
    causal_text: bool = False,
) -> Pass:
    """Pack the rows of an active block into one pass.

    Args:
        buffer: where the tokens are.
        block: the rows.
        plan: the positions that each row runs.
        wanted: bool `[rows, columns]`: positions whose statistics are wanted.
        shadow: give every position of the block that runs a shadow (see `model.windows`), and take the logits of
            sampled positions from their shadows.
        guided: run every row a second time with the given text masked, for classifier-free guidance.
        causal_text: what stands before a block is read causally.
    """
    windows, tokens, unconditional = [], [], []
    starts, ends = block.start.tolist(), block.end.tolist()
    ranges = zip(
        block.slot.tolist(), plan.low.tolist(), plan.high.tolist(), plan.keys.tolist(), starts, ends, strict=True
    )
    for slot, low, high, keys, start, end in ranges:
        shadowed = max(0, min(end, high) - start) if shadow else 0  # 0 for a piece of a prompt, which ends before it
        drafted = max(0, high - max(low, start)) if causal_text else 0
        window = Window(slot, low, high - low, keys, start if shadowed else 0, shadowed, drafted)
        windows.append(window)
        shadows = torch.full((window.shadows,), buffer.mask_id)
        tokens += [buffer.tokens[slot, low:high], shadows]
        if guided:
            given = buffer.given[slot, low:high]
            unconditional += [buffer.tokens[slot, low:high].masked_fill(given, buffer.mask_id), shadows]
    offsets, index = _output_order(windows, block, wanted, shadow)
    row, column = offsets // wanted.shape[1], offsets % wanted.shape[1]
    rows = LogitRows(
        slot=block.slot[row],
        position=block.first[row] + column,
        stream=block.stream[row],
        step=block.step[row],
        current=block.tokens.flatten()[offsets],
    )
    output_mask = torch.zeros(sum(window.total for window in windows), dtype=torch.bool)
    output_mask[index] = True
    if guided:
        slots = buffer.tokens.shape[0]
        windows += [replace(window, slot=window.slot + slots) for window in windows]
        output_mask = output_mask.repeat(2)
    return Pass(torch.cat([*tokens, *unconditional]), windows, output_mask, rows, offsets)


def _output_order(windows: list[Window], block: ActiveBlock, wanted: Tensor, shadow: bool) -> tuple[Tensor, Tensor]:
    """Offsets of the wanted positions in the flattened active block and in the pass, both in the pass's order."""
    row, column = wanted.nonzero(as_tuple=True)
    position = block.first[row] + column
    offsets = torch.tensor([0, *(window.total for window in windows)]).cumsum(0)[:-1]
    low = torch.tensor([window.first for window in windows])
    index = offsets[row] + position - low[row]
    if shadow:
        width = torch.tensor([window.width for window in windows])
        of_shadow = offsets[row] + width[row] + position - block.start[row]
        index = torch.where(block.editable[row, column], of_shadow, index)
    order = index.argsort()
    return (row * wanted.shape[1] + column)[order], index[order]
