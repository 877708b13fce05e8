"""One forward pass over a group: the tokens that run, packed, and the rows that meet the output layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llada_megatron.llada_moe.model.windows import Window
from llada_megatron.llada_moe.sampling.caches import CachePlan
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock, LogitRows, TokenBuffer


@dataclass(frozen=True)
class Pass:
    """What a model is to run; all on the host."""

    tokens: Tensor
    """[total] int64."""
    windows: list[Window]
    """They fill `total` in this order."""
    asked: Tensor
    """[total] bool: rows that meet the output layer. With guidance their second half is that of the blank twins."""
    rows: LogitRows
    """Names of the rows that are asked for, without the twins', in order."""
    place: Tensor
    """[rows] int64: their offsets in the flattened view."""

    @property
    def positions(self) -> Tensor:
        """Of the tokens in their sequences: `[total]` int64."""
        return torch.cat([window.positions for window in self.windows])

    def totals(self, rows: int) -> Tensor:
        """Positions that run for each row of the view, with its blank twin: int64 `[rows]`."""
        return torch.tensor([window.total for window in self.windows]).view(-1, rows).sum(0)

    @classmethod
    def idle(cls, mask_id: int) -> Pass:
        """One token that nobody asks for: for a rank that must take part in the experts' exchange of others."""
        none = torch.zeros(0, dtype=torch.int64)
        rows = LogitRows(none, none, none, none, none)
        return cls(torch.tensor([mask_id]), [Window(0, 0, 1, 1)], torch.zeros(1, dtype=torch.bool), rows, none)


def pack(canvas: TokenBuffer, view: ActiveBlock, plan: CachePlan, ask: Tensor, shadow: bool, guided: bool) -> Pass:
    """The pass of the rows of a view.

    Args:
        canvas: what the tokens are taken from.
        view: the rows.
        plan: what each of them runs.
        ask: bool `[rows, columns]`: positions whose statistics are wanted.
        shadow: ask the written ones of them of their shadows (see `model.windows`); all that runs of the block has one.
        guided: run every row a second time with the given text masked.
    """
    windows, tokens, blank = [], [], []
    starts, ends = view.start.tolist(), view.end.tolist()
    ranges = zip(
        view.slot.tolist(), plan.low.tolist(), plan.high.tolist(), plan.keys.tolist(), starts, ends, strict=True
    )
    for slot, low, high, keys, start, end in ranges:
        shadowed = max(0, min(end, high) - start) if shadow else 0  # a piece of a prompt has none of the block
        window = Window(slot, low, high - low, keys, start if shadowed else 0, shadowed)
        windows.append(window)
        shadows = torch.full((window.shadows,), canvas.mask_id)
        tokens += [canvas.tokens[slot, low:high], shadows]
        if guided:
            given = canvas.given[slot, low:high]
            blank += [canvas.tokens[slot, low:high].masked_fill(given, canvas.mask_id), shadows]
    place, index = _asked(windows, view, ask, shadow)
    row, column = place // ask.shape[1], place % ask.shape[1]
    rows = LogitRows(
        slot=view.slot[row],
        position=view.first[row] + column,
        stream=view.stream[row],
        step=view.step[row],
        current=view.tokens.flatten()[place],
    )
    asked = torch.zeros(sum(window.total for window in windows), dtype=torch.bool)
    asked[index] = True
    if guided:
        slots = canvas.tokens.shape[0]
        windows += [Window(w.slot + slots, w.first, w.width, w.keys, w.shadow_first, w.shadows) for w in windows]
        asked = asked.repeat(2)
    return Pass(torch.cat([*tokens, *blank]), windows, asked, rows, place)


def _asked(windows: list[Window], view: ActiveBlock, ask: Tensor, shadow: bool) -> tuple[Tensor, Tensor]:
    """Offsets in the flattened view and in the pass of the positions asked for, in the pass's order."""
    row, column = ask.nonzero(as_tuple=True)
    position = view.first[row] + column
    offsets = torch.tensor([0, *(window.total for window in windows)]).cumsum(0)[:-1]
    low = torch.tensor([window.first for window in windows])
    index = offsets[row] + position - low[row]
    if shadow:
        width = torch.tensor([window.width for window in windows])
        of_shadow = offsets[row] + width[row] + position - view.start[row]
        index = torch.where(view.editable[row, column], of_shadow, index)
    order = index.argsort()
    return (row * ask.shape[1] + column)[order], index[order]
