"""Attention over packed documents, as a model here computes it, against one product with a dense mask.

Times are the device's, with the host ahead of it, as it is in a training step; `seconds_alone` is a single call of an
idle device, whose host time counts whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llada_megatron.llada_moe.model.attention.backends import attention_backend
from llada_megatron.llada_moe.model.initialization import draw_in_place
from llada_megatron.llada_moe.model.patterns import AttentionPattern, segments
from llada_megatron.parallel import device
from llada_megatron.parallel.build import build_run_chunks
from llada_megatron.parallel.training.peak import device_seconds, timed
from llada_megatron.tools.bench.gpu.part_run import PartRun, release_memory
from llada_megatron.tools.bench.gpu.workloads import BLOCK_SIZE, DENSE, document_boundaries, workload
from llada_megatron.tools.bench.measurement import largest, peak_bytes

LENGTHS, TOY_LENGTHS = (4096, 16384), (64, 128)
DOCUMENTS = 8
PATTERNS = {
    "block-causal": AttentionPattern(BLOCK_SIZE),
    "full": AttentionPattern(None),
    "[x_t ; x_0]": AttentionPattern(BLOCK_SIZE, doubled=True),
}
_REPEATS = 10


def compare(part: PartRun) -> None:
    """Forward and backward pass of one layer's attention: 16 heads over 4 of keys, 128 features (a toy: 4 of 16)."""
    for kind, length in cells(part.toy):
        part.measure(cell(kind, length), _figures, part.toy, PATTERNS[kind], length)
        release_memory()


def cells(toy: bool) -> list[tuple[str, int]]:
    """Each pattern at a length and four times it; the doubled one, a kernel to compile, at the first alone."""
    return [(kind, n) for kind in PATTERNS for n in lengths(toy)[: 1 if PATTERNS[kind].doubled else None]]


def lengths(toy: bool) -> tuple[int, int]:
    """A length, and four times it on a GPU."""
    return TOY_LENGTHS if toy else LENGTHS


def cell(kind: str, length: int) -> str:
    """The name of a measurement."""
    return f"{kind}, {length} positions"


def _figures(toy: bool, pattern: AttentionPattern, length: int) -> dict[str, Any]:
    heads, groups, size = (4, 2, 16) if toy else (16, 4, 128)
    here, dtype = device.current(), torch.float32 if toy else torch.bfloat16
    attend = _of_a_model(heads, groups, size, pattern, length)
    boundaries = _boundaries(length, pattern)
    generator = torch.Generator(here).manual_seed(0)
    query, key, value, upstream = (
        torch.randn(length, 1, n, size, generator=generator, device=here, dtype=dtype)
        for n in (heads, groups, groups, heads)
    )
    repeated = [part.repeat_interleave(heads // groups, dim=2) for part in (key, value)]  # few kernels take groups
    seen = dense_mask(boundaries, length, pattern).to(here)
    mask = torch.zeros(seen.shape, dtype=dtype, device=here).masked_fill_(~seen, -math.inf)

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.permute(1, 2, 0, 3) for part in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.permute(2, 0, 1, 3).flatten(2)

    ours = _Pass(lambda *parts: attend(*parts, boundaries), (query, key, value), upstream)
    theirs = _Pass(dense, (query, *repeated), upstream)
    repeats = 1 if toy else _REPEATS
    apart = _apart(ours.results(), theirs.results(), heads // groups)
    alone, seconds, dense_seconds = timed(ours, here), *(device_seconds(each, here, repeats) for each in (ours, theirs))
    chosen = attention_backend(pattern, here.type, dtype, head_dim=size, engine=attend.engine is not None)
    return {
        "backend": f"{chosen.backend.value} ({chosen.reason})",
        "seconds": seconds,
        "dense_seconds": dense_seconds,
        "seconds_alone": alone,
        "times_as_fast": dense_seconds / seconds,
        "peak_gb": peak_bytes(ours) / 1e9,
        "dense_peak_gb": (peak_bytes(theirs) + mask.nbytes) / 1e9,
        **apart,
    }


class _Pass:
    """A forward and a backward pass of one way to attend, over fixed tensors `[seq, batch, heads, features]`."""

    def __init__(
        self, attend: Callable[..., torch.Tensor], tensors: Sequence[torch.Tensor], upstream: torch.Tensor
    ) -> None:
        self._attend, self._upstream = attend, upstream.flatten(2)
        self._leaves = [tensor.clone().requires_grad_() for tensor in tensors]

    def __call__(self) -> torch.Tensor:
        for leaf in self._leaves:
            leaf.grad = None
        out = self._attend(*self._leaves)
        out.backward(self._upstream)
        return out.detach()

    def results(self) -> list[torch.Tensor]:
        """The result, and the gradients of queries, keys and values."""
        return [self(), *(leaf.grad for leaf in self._leaves if leaf.grad is not None)]


def _apart(ours: list[torch.Tensor], theirs: list[torch.Tensor], group: int) -> dict[str, float]:
    """|a - b| / |b| of the result, and the largest of those of the gradients; `theirs` has a key for every query
    head, whose gradients belong to the key of `group` of them."""
    pairs = [(mine.float(), _grouped(other, mine)) for mine, other in zip(ours, theirs, strict=True)]
    out, *gradients = (float((mine - other).norm() / other.norm()) for mine, other in pairs)
    return {"difference": out, "gradient_difference": largest(gradients)}


def _grouped(theirs: torch.Tensor, ours: torch.Tensor) -> torch.Tensor:
    """The sum over the heads that share one of ours."""
    if theirs.shape == ours.shape:
        return theirs.float()
    return theirs.float().unflatten(2, (ours.size(2), -1)).sum(dim=3)


def _of_a_model(heads: int, groups: int, size: int, pattern: AttentionPattern, length: int) -> torch.nn.Module:
    """The core attention of the only layer of a model that is built as for training."""
    model = dataclasses.replace(
        DENSE,
        num_layers=1,
        hidden_size=heads * size,
        ffn_hidden_size=heads * size,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=size,
        vocab_size=256,
        max_sequence_length=length,
        mask_token_id=3,
        eos_token_id=2,
    )
    chunk = build_run_chunks(workload(model, length, 1, 1, pattern.block).run, draw_in_place)[0]
    chunk.use_pattern(pattern)
    return chunk.decoder.layers[0].self_attention.core_attention


def _boundaries(length: int, pattern: AttentionPattern) -> torch.Tensor:
    """Of one window; those of a doubled one name the documents of both halves."""
    half = length // pattern.copies
    made = document_boundaries(1, half, DOCUMENTS, seed=length)
    return torch.cat([made, made[1:] + half]) if pattern.doubled else made


def dense_mask(boundaries: torch.Tensor, length: int, pattern: AttentionPattern) -> torch.Tensor:
    """Who sees whom in one window, bool `[length, length]`."""
    document, block = torch.empty(length, dtype=torch.long), torch.zeros(length, dtype=torch.long)
    for number, segment in enumerate(segments(boundaries, length)):
        document[segment.start : segment.stop] = number
        if pattern.block is not None:
            block[segment.start : segment.stop] = torch.arange(segment.stop - segment.start) // pattern.block
    if not pattern.doubled:
        return (document[:, None] == document[None]) & (block[None] <= block[:, None])
    half, count = length // 2, (len(boundaries) - 1) // 2
    clean = torch.arange(length) >= half
    same = document[:, None] % count == document[None] % count
    from_noisy = torch.where(clean[None], block[None] < block[:, None], block[None] == block[:, None])
    from_clean = clean[None] & (block[None] <= block[:, None])
    return same & torch.where(clean[:, None], from_clean, from_noisy)
