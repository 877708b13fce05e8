"""Attention over sequences `[x_t ; x_0]`, in parts that are merged by their log-sum-exp: exact, and linear in memory.

All queries of a chunk see the clean keys of their document before it, in a product without a mask; the keys of the
chunk itself take a second product, with a mask as large as a chunk or, for blocks of a chunk or more, without one. For
a row whose scores fall into parts with results o_i and log-sum-exps l_i the softmax over all is
sum_i exp(l_i - l) o_i, with l the log-sum-exp of the l_i. The backward pass of a part, given the merged result and
log-sum-exp, gives exactly this part's share of the gradients (as in flash attention, arXiv 2307.08691), so that nothing
but these two is kept. Heads that share keys are taken as further queries, so that no key is repeated.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from llada_megatron.llada_moe.model.attention.doubled_documents import Chunk, DoubledDocuments
from llada_megatron.llada_moe.model.attention.per_document import product

_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: DoubledDocuments, scale: float | None
) -> torch.Tensor:
    """Attend to both halves; arguments and result as in `per_document.attend`."""
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    found = _Merged.apply(q, k, v, packed, scale) if query.device.type == "cpu" else in_one(q, k, v, packed, scale)
    return found.permute(2, 0, 1, 3).flatten(2)


KEYS_AT_ONCE = 512
"""Keys before a chunk that a product of the backward pass takes."""


class Part(NamedTuple):
    """A product: some queries of a chunk, and keys that they see."""

    queries: slice
    """Among the chunk's queries that this rank holds."""
    keys: tuple[slice, ...]
    """Positions of the sequence."""
    mask: torch.Tensor | None
    """What is added to the scores `[queries, keys]`; None where all these queries see all these keys."""


class Parts(NamedTuple):
    """The products of a chunk."""

    own: list[Part]
    """With the keys of the chunk: each query in one of them, in order."""
    before: Part | None
    """All queries with the clean keys of the document before the chunk; None where there are none."""


def parts(chunk: Chunk, packed: DoubledDocuments, like: torch.Tensor) -> Parts:
    """The products of a chunk; masks have the type and device of `like`."""
    block, start, width = packed.block if chunk.noisy else packed.clean_block, chunk.document, chunk.stop - chunk.first
    own, clean = (slice(at + chunk.first, at + chunk.stop) for at in (start, packed.half + start))
    noisy, total = (sum(held.stop - held.start for held in part) for part in (chunk.noisy, chunk.held))
    everyone = slice(0, total)
    if width <= block:
        whole = [Part(slice(0, noisy), (own,), None), Part(slice(noisy, total), (clean,), None)]
        mine = [part for part in whole if part.queries.start < part.queries.stop]
    else:
        spans = (tuple(held.after(chunk.first) for held in part) for part in (chunk.noisy, chunk.clean))
        mask = chunk_mask(block, width, *spans, like.dtype, like.device)
        mine = [Part(everyone, (own, clean) if noisy else (clean,), mask)]
    first = packed.half + start
    return Parts(mine, Part(everyone, (slice(first, first + chunk.first),), None) if chunk.first else None)


@functools.lru_cache(maxsize=16)
def chunk_mask(
    block: int,
    width: int,
    noisy: tuple[tuple[int, int], ...],
    clean: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """What the queries of a chunk of `width` positions add to the scores of its keys, `[queries, keys]`.

    Queries are those of the noisy spans [first, stop) and then of the clean ones; keys are the chunk's noisy positions,
    where there is a noisy query, and then the clean ones.
    """
    with torch.inference_mode(False):
        keys = torch.arange(width, device=device) // block
        rows = []
        for span in noisy:
            mine = (torch.arange(*span, device=device) // block)[:, None]
            rows.append(torch.cat([mine == keys, mine > keys], dim=1))
        for span in clean:
            seen = (torch.arange(*span, device=device) // block)[:, None] >= keys
            rows.append(torch.cat([torch.zeros_like(seen), seen], dim=1) if noisy else seen)
        sees = torch.cat(rows)
        return torch.zeros(sees.shape, dtype=dtype, device=device).masked_fill_(~sees, float("-inf"))


class _Merged(torch.autograd.Function):
    """Queries `[batch, heads, queries, head_dim]`, keys and values `[batch, kv_heads, positions, head_dim]`."""

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: DoubledDocuments, scale: float | None
    ) -> torch.Tensor:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=_accumulated(q.dtype))
        for sequences, row in _rows(packed):
            queries, keys, values = q[sequences], k[sequences], v[sequences]
            for chunk in row:
                found = _attend_chunk(_taken(queries, chunk), keys, values, parts(chunk, packed, q), scale)
                for whole, part in zip((out[sequences], lse[sequences]), found, strict=True):
                    _put(whole, part, chunk)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.packed, ctx.scale = packed, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), *(torch.zeros_like(t, dtype=_accumulated(t.dtype)) for t in (k, v))
        for sequences, row in _rows(ctx.packed):
            of_queries = [tensor[sequences] for tensor in (upstream, q, out, lse)]
            of_keys = [tensor[sequences] for tensor in (k, v, dk, dv)]
            for chunk in row:
                cut = parts(chunk, ctx.packed, q)
                _put(
                    dq[sequences],
                    _chunk_gradients([_taken(tensor, chunk) for tensor in of_queries], of_keys, cut, ctx.scale),
                    chunk,
                )
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None


def _attend_chunk(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cut: Parts, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and log-sum-exp of a chunk's queries `[batch, heads, queries, head_dim]`."""
    found = [_product(q[:, :, part.queries], k, v, part, scale) for part in cut.own]
    out, lse = found[0] if len(found) == 1 else (torch.cat(pair, dim=2) for pair in zip(*found, strict=True))
    if cut.before is None:
        return out, lse
    before, before_lse = _product(q, k, v, cut.before, scale)
    total = torch.logaddexp(lse, before_lse)
    share, share_before = ((one - total).exp().unsqueeze(-1) for one in (lse, before_lse))
    return out * share + before * share_before, total


def _product(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, part: Part, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and log-sum-exp of one part."""
    mask = _folded_mask(part.mask, q, k)
    out, lse = _FORWARD(_folded(q, k), _keys(k, part), _keys(v, part), 0.0, False, attn_mask=mask, scale=scale)
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def _chunk_gradients(
    of_queries: Sequence[torch.Tensor], of_keys: Sequence[torch.Tensor], cut: Parts, scale: float | None
) -> torch.Tensor:
    """The gradient of a chunk's queries; those of the keys and values that they see are added to `dk` and `dv`.

    Args:
        of_queries: the upstream gradient, the queries, the result and its log-sum-exp, of the chunk.
        of_keys: `k`, `v`, `dk` and `dv` of the whole sequences.
    """
    dq = torch.zeros_like(of_queries[1], dtype=of_keys[2].dtype)
    for part in cut.own if cut.before is None else [*cut.own, *_pieces(cut.before)]:
        mine = dq[:, :, part.queries]
        mine += _part_gradients([tensor[:, :, part.queries] for tensor in of_queries], of_keys, part, scale)
    return dq


def _part_gradients(
    of_queries: Sequence[torch.Tensor], of_keys: Sequence[torch.Tensor], part: Part, scale: float | None
) -> torch.Tensor:
    """The same of one part, for its queries. What is made here ends with it: the peak of memory is in these calls."""
    upstream, q, out, lse = of_queries
    k, v, dk, dv = of_keys
    given, mine, found = (_folded(tensor, k) for tensor in (upstream, q, out))
    sums, mask = lse.reshape(*mine.shape[:3]), _folded_mask(part.mask, q, k)
    of_q, of_k, of_v = _BACKWARD(
        given, mine, _keys(k, part), _keys(v, part), found, sums, 0.0, False, attn_mask=mask, scale=scale
    )
    lengths = [one.stop - one.start for one in part.keys]
    for whole, gradient in ((dk, of_k), (dv, of_v)):
        for where, piece in zip(part.keys, gradient.split(lengths, dim=2), strict=True):
            whole[:, :, where] += piece
    return of_q.reshape(q.shape)


def _pieces(part: Part) -> Iterator[Part]:
    """A part without a mask as products with few keys each: the kernel makes gradients of all keys that it is given."""
    for keys in part.keys:
        for first in range(keys.start, keys.stop, KEYS_AT_ONCE):
            yield Part(part.queries, (slice(first, min(first + KEYS_AT_ONCE, keys.stop)),), None)


def _rows(packed: DoubledDocuments) -> Iterator[tuple[slice, tuple[Chunk, ...]]]:
    """Sequences and the chunks that they have in common."""
    if len(set(packed.rows)) == 1:
        yield slice(None), packed.rows[0]
        return
    for number, row in enumerate(packed.rows):
        yield slice(number, number + 1), row


def _taken(tensor: torch.Tensor, chunk: Chunk) -> torch.Tensor:
    """The chunk's queries of `[batch, heads, queries, …]`."""
    return torch.cat([tensor[:, :, held.rows] for held in chunk.held], dim=2)


def _put(whole: torch.Tensor, part: torch.Tensor, chunk: Chunk) -> None:
    """Write `part` where `_taken` would take it from."""
    lengths = [held.stop - held.start for held in chunk.held]
    for held, piece in zip(chunk.held, part.split(lengths, dim=2), strict=True):
        whole[:, :, held.rows] = piece


def _keys(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    pieces = [tensor[:, :, where] for where in part.keys]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _folded(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Heads that share keys as queries: `[batch, kv_heads, heads / kv_heads * queries, head_dim]`."""
    return q if q.size(1) == k.size(1) else q.reshape(q.size(0), k.size(1), -1, q.size(3))


def _folded_mask(mask: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    return mask if mask is None or q.size(1) == k.size(1) else mask.repeat(q.size(1) // k.size(1), 1)


def _accumulated(dtype: torch.dtype) -> torch.dtype:
    """What sums are kept in."""
    return dtype if dtype == torch.float64 else torch.float32


def in_one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packed: DoubledDocuments, scale: float | None
) -> torch.Tensor:
    """The same as products over all keys of a chunk, by torch's public function: for devices without `_FORWARD`.

    Exact as well, but slower, and the backward pass keeps the keys of every chunk once more.
    """
    rows = []
    for number, row in enumerate(packed.rows):
        queries, keys, values = (tensor[number : number + 1] for tensor in (q, k, v))
        found = []
        for chunk in row:
            mine, cut = _taken(queries, chunk), parts(chunk, packed, q)
            for part in cut.own:
                whole = part if cut.before is None else _joined(part, cut.before.keys)
                seen = _keys(keys, whole), _keys(values, whole)
                found.append(product(mine[:, :, part.queries], *seen, scale, attn_mask=whole.mask))
        order = torch.cat([torch.arange(held.rows.start, held.rows.stop) for chunk in row for held in chunk.held])
        rows.append(torch.cat(found, dim=2).index_select(2, order.argsort().to(q.device)))
    return torch.cat(rows)


def _joined(part: Part, before: tuple[slice, ...]) -> Part:
    """`part` with further keys, which all its queries see."""
    length = sum(where.stop - where.start for where in before)
    mask = None if part.mask is None else torch.nn.functional.pad(part.mask, (0, length))
    return Part(part.queries, part.keys + before, mask)
