"""One product per document: what serves every pattern and precision, and the fastest way on a CPU.

Queries, keys and values are split, never sliced, so that each gradient is written once: a slice's gradient is as large
as what it was taken from, which for many documents is most of the work of the backward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from llada_megatron.llada_moe.model.attention.packed_documents import PackedDocuments, PackedRow
from llada_megatron.llada_moe.model.patterns import Band, bands

QUERIES_AT_ONCE = 256
"""Small blocks are attended to in bands of about this many queries; larger blocks one by one."""


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedDocuments, scale: float | None
) -> torch.Tensor:
    """Attend document by document.

    Args:
        query: `[seq, batch, heads, head_dim]`, the positions of this rank.
        key: `[positions, batch, kv_heads, head_dim]`, the whole sequences; `value` the same.
        packed: who sees whom.
        scale: of the scores; None = head_dim ** -0.5.

    Returns:
        `[seq, batch, heads * head_dim]`.
    """
    block = packed.pattern.block
    if len(packed.rows) > 1 and len(set(packed.rows)) == 1 and all(len(row.parts) == 1 for row in packed.rows[0]):
        return _attend_alike(query, key, value, packed.rows[0], block, scale).reshape(*query.shape[:2], -1)
    columns = zip(*(_sequences(tensor) for tensor in (query, key, value)), strict=True)
    rows = [_attend_runs(*column, runs, block, scale) for column, runs in zip(columns, packed.rows, strict=True)]
    return (rows[0][:, None] if len(rows) == 1 else torch.stack(rows, dim=1)).flatten(2)


def _attend_alike(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    runs: Sequence[PackedRow],
    block: int | None,
    scale: float | None,
) -> torch.Tensor:
    """All sequences in one product for each run, which lies in one document; `[seq, batch, heads, head_dim]`."""
    found = []
    for mine, row in zip(query.split([row.queries for row in runs]), runs, strict=True):
        q, k, v = (part.permute(1, 2, 0, 3) for part in (mine, _part(key, row.keys), _part(value, row.keys)))
        found.append(attend_part(q, k, v, row.parts[0].before, block, scale).permute(2, 0, 1, 3))
    return found[0] if len(found) == 1 else torch.cat(found)


def _sequences(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`[seq, batch, …]` as one `[seq, …]` a sequence."""
    return (tensor.squeeze(1),) if tensor.size(1) == 1 else tensor.unbind(1)


def _part(tensor: torch.Tensor, keys: slice) -> torch.Tensor:
    return tensor if keys == slice(0, tensor.size(0)) else tensor[keys]


def _attend_runs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    runs: Sequence[PackedRow],
    block: int | None,
    scale: float | None,
) -> torch.Tensor:
    """One sequence; all tensors `[seq, heads, head_dim]`."""
    if len(runs) == 1:
        return _attend_row(query, key, value, runs[0], block, scale)
    mine = zip(query.split([row.queries for row in runs]), runs, strict=True)
    return torch.cat([_attend_row(part, key, value, row, block, scale) for part, row in mine])


def _attend_row(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, row: PackedRow, block: int | None, scale: float | None
) -> torch.Tensor:
    """One run of a sequence; all tensors `[seq, heads, head_dim]`."""
    queries, keys = [part.queries for part in row.parts], [part.keys for part in row.parts]
    key, value = (_part(tensor, row.keys).split(keys) for tensor in (key, value))
    pieces = zip(query.split(queries), key, value, row.parts, strict=True)
    found = []
    for q, k, v, part in pieces:
        q, k, v = (piece.transpose(0, 1)[None] for piece in (q, k, v))
        found.append(attend_part(q, k, v, part.before, block, scale)[0].transpose(0, 1))
    return torch.cat(found)


def attend_part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, before: int, block: int | None, scale: float | None
) -> torch.Tensor:
    """Some queries of a document `[batch, heads, queries, head_dim]`, `before` positions after its start, with its
    keys `[batch, kv_heads, keys, head_dim]` from the start on."""
    if block is None:
        return product(q, k, v, scale)
    if block == 1 and q.size(2) == k.size(2):
        return product(q, k, v, scale, is_causal=True)
    span = block * max(1, QUERIES_AT_ONCE // block)
    cut = list(bands(before, before + q.size(2), k.size(2), block, span))
    length = cut[-1].keys
    if length < k.size(2):
        k, v = k[:, :, :length], v[:, :, :length]
    found = []
    for band, mine in zip(cut, q.split([band.stop - band.start for band in cut], dim=2), strict=True):
        (keys, k), (values, v) = _first_of(k, band.keys), _first_of(v, band.keys)
        found.append(product(mine, keys, values, scale, attn_mask=band_mask(band, length, block, span, q)))
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def product(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None, **pattern: Any) -> torch.Tensor:
    """torch's scaled_dot_product_attention, for fewer heads of keys than of queries as well."""
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, scale=scale, enable_gqa=q.size(1) != k.size(1), **pattern
    )


def _first_of(whole: torch.Tensor, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `keys` of `whole` `[batch, heads, positions, head_dim]`, and `whole` for the bands that follow."""
    if keys == whole.size(2):
        return whole, whole
    return _Prefix.apply(whole, keys) if whole.requires_grad else (whole[:, :, :keys], whole)


class _Prefix(torch.autograd.Function):
    """A prefix whose gradient is added to that of the bands after it in place; a slice would write two tensors as large
    as the whole for every band."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.keys = keys
        return whole[:, :, :keys], whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_prefix: torch.Tensor, of_whole: torch.Tensor) -> tuple[torch.Tensor, None]:
        of_whole[:, :, : ctx.keys].add_(of_prefix)  # made by the product of the next band for this node alone
        return of_whole, None


def band_mask(band: Band, length: int, block: int, span: int, like: torch.Tensor) -> torch.Tensor | None:
    """What the band's queries add to their scores, `[queries, keys]`; None where all see the same keys."""
    if band.start // block == (band.stop - 1) // block:
        return None
    past = max(1024, 1 << (length - 1).bit_length())  # few sizes, so that documents of any length share one mask
    mask = _widest_mask(block, span, past, like.dtype, like.device)
    return mask[band.start - band.first : band.stop - band.first, past - band.first : past - band.first + band.keys]


@functools.lru_cache(maxsize=8)
def _widest_mask(block: int, span: int, past: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`[span, past + span]`: a band that `past` keys precede; every other band's is a view of it, so that the masks
    kept for the backward pass of all layers are one tensor."""
    with torch.inference_mode(False):
        rows = torch.arange(span, device=device) // block
        columns = torch.arange(-past, span, device=device) // block
        hidden = columns[None, :] > rows[:, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
