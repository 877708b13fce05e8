"""Which shape serves a pass, and the pass's contents laid out for it."""

from __future__ import annotations

import torch
from torch import Tensor

from llada_megatron.llada_moe.model.fixed_windows import PassShape
from llada_megatron.llada_moe.model.windows import KeyValues
from llada_megatron.llada_moe.sampling.passes import Pass

MOST_POSITIONS = 4096
"""A longer pass spends its time in products, which a graph does not shorten, while its buffers would stay reserved."""
FREE_PER_WEIGHT = 256
"""Positions that a GPU multiplies with a weight in about the time in which it reads the weight: some 300 in bf16 on an
H100 (990 TFLOP/s over 3.35 TB/s). Up to there, padding costs little."""
MOST_PADDED = 1.25
"""Positions that a longer pass may run for each one that it needs."""
LEAST_ROWS, WIDTH_STEP = 32, 32
KEYS_STEP = 64
"""Fused attention reads a bias in aligned rows, so that it needs no copy where the keys are a multiple of this."""


def shape_of(work: Pass, memory: KeyValues | None, weights_per_use: float = 1.0) -> PassShape | str:
    """The shape that serves a pass, or the reason why none does.

    Args:
        work: the pass.
        memory: the kept keys and values; None = every window is a whole sequence.
        weights_per_use: weights that the model reads for each one that a token uses, such as experts over chosen ones.
    """
    if any(window.shadows for window in work.windows):
        return "the editor runs positions a second time, as shadows"
    count, slots = len(work.windows), [window.slot for window in work.windows]
    width = _multiple(max(window.width for window in work.windows), WIDTH_STEP)
    most = None if memory is None else memory.slots
    windows = count if count == most else min(_power(count), most or _power(count))
    positions, run = windows * width, work.tokens.numel()
    if positions > MOST_POSITIONS:
        return f"more than {MOST_POSITIONS} positions"
    if positions > max(MOST_PADDED * run, FREE_PER_WEIGHT * weights_per_use):
        return "windows of different widths"
    rows = work.output_mask.sum().item()
    keys = width
    if memory is not None:
        keys = min(memory.capacity, max(KEYS_STEP, _power(max(window.keys for window in work.windows))))
    return PassShape(
        windows=windows,
        width=width,
        keys=keys,
        rows=max(LEAST_ROWS, _power(rows)) if rows else 0,
        in_order=memory is not None and windows == count and slots == list(range(count)),
    )


def contents(work: Pass, shape: PassShape, block: int | None) -> Tensor:
    """What `FixedWindows.inputs` holds for a pass: int64, on the host. `block`: block size of the attention."""
    each = torch.arange(shape.windows).clamp(max=len(work.windows) - 1)
    first, width, keys, slots = torch.tensor([(w.first, w.width, w.keys, w.slot) for w in work.windows]).unbind(1)
    begin = width.cumsum(0) - width
    column = torch.minimum(torch.arange(shape.width), width[each, None] - 1)
    tokens, positions = work.tokens[begin[each, None] + column], first[each, None] + column
    seen = keys[each, None].expand_as(positions)
    if block is not None:
        draft = (first + width - torch.tensor([w.drafted for w in work.windows]))[each, None]
        seen = torch.minimum(seen, (positions // block + 1) * block).where(positions < draft, seen)
    return torch.cat([tokens.flatten(), positions.flatten(), seen.flatten(), slots[each], _rows(work, shape, begin)])


def _rows(work: Pass, shape: PassShape, begin: Tensor) -> Tensor:
    """Places of the wanted rows in a pass of this shape, the last one repeated: int64 `[shape.rows]`."""
    packed = work.output_mask.nonzero().flatten()
    if not packed.numel():
        return packed
    window = torch.searchsorted(begin, packed, right=True) - 1
    places = window * shape.width + packed - begin[window]
    return places[torch.arange(shape.rows).clamp(max=len(places) - 1)]


def _power(number: int) -> int:
    """The least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def _multiple(number: int, step: int) -> int:
    return -(-number // step) * step
