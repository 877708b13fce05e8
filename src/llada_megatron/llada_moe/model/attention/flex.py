"""FlexAttention: a compiled kernel that skips what a mask hides tile by tile. Serves every pattern, in one call.

The tiles are found on the host, from the first and last key that each query sees, once a batch: torch's own
`create_block_mask` evaluates the mask for every pair of positions on the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llada_megatron.llada_moe.model.attention.doubled_documents import DoubledDocuments
from llada_megatron.llada_moe.model.attention.packed_documents import PackedDocuments, on_device
from llada_megatron.llada_moe.model.compiled import of_a_kind

Packed = PackedDocuments | DoubledDocuments

TILE = 128
"""Queries and keys of a tile: what FlexAttention's kernels skip or compute as a whole."""


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: Packed, scale: float | None
) -> torch.Tensor:
    """Attend to all documents in one call; arguments and result as in `per_document.attend`."""
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    mask, grouped = packed.once(block_mask, query.device), q.size(1) != k.size(1)
    operation = _operation(query.device.type, _kind(q, k, v, packed, scale))
    out = operation(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped)
    return out.permute(2, 0, 1, 3).flatten(2)


def _kind(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: Packed, scale: float | None
) -> tuple[Hashable, ...]:
    """All that a call is compiled for but its lengths."""
    mode = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *(t.requires_grad for t in (q, k, v))
    heads = q.size(1), k.size(1), q.size(3), v.size(3)
    return q.dtype, heads, scale, q.size(0) == 1, isinstance(packed, DoubledDocuments), mode


@functools.cache
def _operation(device: str, kind: tuple[Hashable, ...]) -> Callable[..., Any]:
    """Compiled on a GPU: without, it computes all scores. On a CPU it has no backward pass, and is for tests."""
    from torch.nn.attention.flex_attention import flex_attention

    return of_a_kind(flex_attention, kind) if device == "cuda" else flex_attention


def block_mask(packed: Packed, device: torch.device) -> Any:
    """torch's BlockMask of these documents."""
    from torch.nn.attention.flex_attention import BlockMask

    ranges = packed.key_ranges()
    found = [tiles(begins, ends, packed.positions) for begins, ends in ranges]
    some, whole = (np.logical_or.reduce(part) for part in zip(*found, strict=True))
    bounds = [(on_device(begins, device), on_device(ends, device)) for begins, ends in ranges]
    counts, indices = _ordered(some & ~whole, device)
    whole_counts, whole_indices = _ordered(whole, device)
    return BlockMask.from_kv_blocks(
        counts,
        indices,
        whole_counts,
        whole_indices,
        BLOCK_SIZE=TILE,
        mask_mod=_sees_either(*bounds) if len(bounds) == 2 else _sees(*bounds[0]),
        seq_lengths=(ranges[0][0].shape[1], packed.positions),
    )


_Bounds = tuple[torch.Tensor, torch.Tensor]


def _sees_either(own: _Bounds, clean: _Bounds) -> Callable[..., torch.Tensor]:
    """As `_sees`, for queries that see two ranges of keys."""
    sees_own, sees_clean = _sees(*own), _sees(*clean)

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return sees_own(b, h, q, k) | sees_clean(b, h, q, k)

    return sees


def _sees(begins: torch.Tensor, ends: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Whether query `q` of sequence `b` sees key `k`, from the ranges `[batch, queries]` of keys."""

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (begins[b, q] <= k) & (k < ends[b, q])

    return sees


def tiles(begins: NDArray[np.int32], ends: NDArray[np.int32], keys: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which tiles `[batch, tiles of queries, tiles of keys]` have a pair that sees each other, and which no others.

    A tile that reaches beyond the last query or key is never whole.
    """
    edges = np.arange(0, keys, TILE)
    begins, ends = begins[..., None], ends[..., None]
    some = (begins < edges + TILE) & (ends > edges) & (begins < ends)  # an empty range lies inside a tile as well
    whole = (begins <= edges) & (ends >= edges + TILE)
    return _of_query_tiles(some).any(axis=2), _of_query_tiles(whole).all(axis=2)


def _of_query_tiles(of_queries: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`[batch, queries, tiles of keys]` as `[batch, tiles of queries, TILE, tiles of keys]`."""
    batch, queries, columns = of_queries.shape
    filled = np.pad(of_queries, ((0, 0), (0, -queries % TILE), (0, 0)))
    return filled.reshape(batch, -1, TILE, columns)


def _ordered(chosen: NDArray[np.bool_], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """How many tiles of keys each tile of queries has, and which, those first: int32, `[batch, 1, rows, …]`."""
    order = np.argsort(~chosen, axis=-1, kind="stable")
    counts = chosen.sum(axis=-1)
    return on_device(counts[:, None].astype(np.int32), device), on_device(order[:, None].astype(np.int32), device)
