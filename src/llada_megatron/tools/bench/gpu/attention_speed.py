"""Attention over packed documents, as a model here computes it, against one product with a dense mask."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch

from llada_megatron.llada_moe.model.attention.backends import attention_backend
from llada_megatron.llada_moe.model.initialization import draw_in_place
from llada_megatron.llada_moe.model.patterns import AttentionPattern, segments
from llada_megatron.parallel import device
from llada_megatron.parallel.build import build_run_chunks
from llada_megatron.parallel.training.peak import timed
from llada_megatron.tools.bench.gpu.part_run import PartRun, release_memory
from llada_megatron.tools.bench.gpu.workloads import BLOCK_SIZE, DENSE, document_boundaries, workload
from llada_megatron.tools.bench.measurement import peak_bytes

LENGTHS, TOY_LENGTHS = (4096, 16384), (64, 128)
DOCUMENTS = 8
PATTERNS = {"block-causal": BLOCK_SIZE, "full": None}
_REPEATS = 5


def compare(part: PartRun) -> None:
    """Forward and backward pass of one layer's attention: 16 heads over 4 of keys, 128 features (a toy: 4 of 16)."""
    for (kind, block), length in ((each, n) for each in PATTERNS.items() for n in lengths(part.toy)):
        part.measure(cell(kind, length), _figures, part.toy, block, length)
        release_memory()


def lengths(toy: bool) -> tuple[int, int]:
    """A length, and four times it on a GPU."""
    return TOY_LENGTHS if toy else LENGTHS


def cell(kind: str, length: int) -> str:
    """The name of a measurement."""
    return f"{kind}, {length} positions"


def _figures(toy: bool, block: int | None, length: int) -> dict[str, Any]:
    heads, groups, size = (4, 2, 16) if toy else (16, 4, 128)
    attend = _of_a_model(heads, groups, size, block, length)
    boundaries = document_boundaries(1, length, DOCUMENTS, seed=length)
    generator = torch.Generator(device.current()).manual_seed(0)
    dtype = torch.float32 if toy else torch.bfloat16
    leaves = [
        torch.randn(length, 1, n, size, generator=generator, device=device.current(), dtype=dtype).requires_grad_()
        for n in (heads, groups, groups)
    ]
    mask = dense_mask(boundaries, length, AttentionPattern(block)).to(device.current())

    def ours() -> torch.Tensor:
        return attend(*leaves, boundaries)

    def dense() -> torch.Tensor:
        q, k, v = (leaf.permute(1, 2, 0, 3) for leaf in leaves)
        k, v = (part.repeat_interleave(heads // groups, dim=1) for part in (k, v))  # few kernels take groups and a mask
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.permute(2, 0, 1, 3).flatten(2)

    difference = float((ours() - dense()).float().norm() / dense().float().norm())
    seconds, dense_seconds = (_seconds(way, leaves, 1 if toy else _REPEATS) for way in (ours, dense))
    chosen = attention_backend(
        AttentionPattern(block), leaves[0].device.type, dtype, head_dim=size, engine=attend.engine is not None
    )
    return {
        "backend": f"{chosen.backend.value} ({chosen.reason})",
        "seconds": seconds,
        "dense_seconds": dense_seconds,
        "times_as_fast": dense_seconds / seconds,
        "peak_gb": peak_bytes(lambda: _pass(ours, leaves)) / 1e9,
        "dense_peak_gb": (peak_bytes(lambda: _pass(dense, leaves)) + mask.nbytes) / 1e9,
        "difference": difference,
    }


def _of_a_model(heads: int, groups: int, size: int, block: int | None, length: int) -> torch.nn.Module:
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
    chunk = build_run_chunks(workload(model, length, 1, 1, block).run, draw_in_place)[0]
    return chunk.decoder.layers[0].self_attention.core_attention


def dense_mask(boundaries: torch.Tensor, length: int, pattern: AttentionPattern) -> torch.Tensor:
    """Who sees whom in one window, bool `[length, length]`."""
    document, place = torch.empty(length, dtype=torch.long), torch.empty(length, dtype=torch.long)
    for number, segment in enumerate(segments(boundaries, length)):
        document[segment.start : segment.stop] = number
        place[segment.start : segment.stop] = torch.arange(segment.stop - segment.start)
    seen = document[:, None] == document[None, :]
    block = pattern.block
    return seen if block is None else seen & (place[None, :] // block <= place[:, None] // block)


def _pass(way: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> None:
    out = way()
    out.backward(torch.ones_like(out))
    for leaf in leaves:
        leaf.grad = None


def _seconds(way: Callable[[], torch.Tensor], leaves: list[torch.Tensor], repeats: int) -> float:
    """Of a forward and a backward pass, the median."""
    _pass(way, leaves)
    return statistics.median(timed(lambda: _pass(way, leaves), device.current()) for _ in range(repeats))
