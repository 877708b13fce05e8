"""Attention over a pattern is what a dense mask over the whole sequence gives, on one rank and over context ranks."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.model.attention.pattern_attention import PatternAttention
from llada_megatron.llada_moe.model.context_slices import held_runs, in_order, taken
from llada_megatron.llada_moe.model.patterns import CAUSAL, FULL, AttentionPattern, bands, segments, whole_sequences
from llada_megatron.parallel import topology
from tests.ranks import run_ranks

SEQ, BATCH, HEADS, KV_HEADS, SIZE = 600, 2, 4, 2, 8
DOCUMENTS = torch.tensor([0, 10, 333, 600, 1145, 1200], dtype=torch.int32)
BLOCKS = [None, 1, 5, 32, 300, 1000]


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SEQ, BATCH, heads, SIZE, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]


def dense(block: int | None, boundaries: torch.Tensor) -> torch.Tensor:
    """The pattern written down: bool `[batch, 1, seq, seq]`."""
    mask = torch.zeros(BATCH, 1, SEQ, SEQ, dtype=torch.bool)
    for part in segments(boundaries, SEQ):
        for query in range(part.start, part.stop):
            last = part.stop if block is None else part.start + ((query - part.start) // block + 1) * block
            mask[part.row, :, query, part.start : min(part.stop, last)] = True
    return mask


def expected(block: int | None, boundaries: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of queries, keys and values, all `[seq, batch, ...]`."""
    query, key, value, upstream = inputs()
    parts = [part.requires_grad_() for part in (query, key, value)]
    q, k, v = (part.permute(1, 2, 0, 3) for part in parts)
    k, v = (part.repeat_interleave(HEADS // KV_HEADS, dim=1) for part in (k, v))
    scores = (q @ k.transpose(2, 3)) * SIZE**-0.5
    out = scores.masked_fill(~dense(block, boundaries), float("-inf")).softmax(-1) @ v
    out = out.permute(2, 0, 1, 3)
    out.backward(upstream)
    return [out.detach().flatten(2), *(part.grad for part in parts)]


def attended(block: int | None, boundaries: torch.Tensor | None, group: object, rank: int, size: int) -> list:
    """The same from `PatternAttention` on one of `size` context ranks, for its slice of the sequence."""
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * SIZE, num_attention_heads=HEADS)
    groups = SimpleNamespace(cp=group)
    attention = PatternAttention(
        config, 1, AttnMaskType.no_mask, "self", pg_collection=groups, pattern=AttentionPattern(block)
    )
    runs = held_runs(SEQ, rank, size, AttentionPattern(block))
    query, key, value, upstream = (taken(part, runs, dim=0).clone() for part in inputs())
    parts = [part.requires_grad_() for part in (query, key, value)]
    out = attention(*parts, boundaries)
    out.backward(upstream.flatten(2))
    return [out.detach(), *(part.grad for part in parts)]


def on_context_ranks(boundaries: torch.Tensor | None, size: int) -> list[list[torch.Tensor]]:
    topology.initialize(LayoutConfig(context_parallel=size), seed=0)
    group = parallel_state.get_context_parallel_group()
    return [attended(block, boundaries, group, group.rank(), size) for block in BLOCKS]


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("block", BLOCKS)
def test_attention_is_that_of_a_dense_mask(block, isolated):
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    boundaries = DOCUMENTS if isolated else whole_sequences(BATCH, SEQ)
    torch.testing.assert_close(attended(block, boundaries, alone, 0, 1), expected(block, boundaries))


@pytest.mark.parametrize("isolated", [True, False])
def test_context_ranks_attend_like_one_process(isolated):
    boundaries = DOCUMENTS if isolated else whole_sequences(BATCH, SEQ)
    ranks = run_ranks(on_context_ranks, 2, boundaries, 2)
    for case, block in enumerate(BLOCKS):
        pattern = AttentionPattern(block)
        joined = [in_order(torch.cat(parts), 2, pattern) for parts in zip(*(rank[case] for rank in ranks), strict=True)]
        torch.testing.assert_close(joined, expected(block, boundaries))


def test_bands_cover_every_query_once_and_see_whole_blocks():
    found = list(bands(start=30, stop=100, length=100, block=8, span=32))
    assert [position for band in found for position in range(band.start, band.stop)] == list(range(30, 100))
    assert [(band.first, band.keys) for band in found] == [(0, 32), (32, 64), (64, 96), (96, 100)]


def test_a_block_has_positions():
    with pytest.raises(ValueError, match="blocks of 0 positions"):
        AttentionPattern(0)


def test_the_pattern_of_a_model_is_a_value_of_the_step():
    model = ModelConfig(
        family="llada",
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        vocab_size=64,
        max_sequence_length=16,
        mask_token_id=63,
        eos_token_id=62,
    )
    assert run_ranks(_logits_by_pattern, 1, model) == [True]


def _logits_by_pattern(model):
    from llada_megatron.llada_moe.model.transformer import build_model
    from llada_megatron.parallel.build import transformer_config

    topology.initialize(LayoutConfig(), seed=1)
    config = transformer_config(model, LayoutConfig())
    tokens = torch.arange(16)[None]
    rows = torch.ones_like(tokens, dtype=torch.bool)
    patterns = [FULL, CAUSAL, AttentionPattern(4)]
    one = build_model(model, config, pattern=FULL).eval()
    found = [one(tokens, rows=rows, pattern=pattern) for pattern in patterns]
    for pattern, logits in zip(patterns, found, strict=True):
        built = build_model(model, config, pattern=pattern).eval()
        built.load_state_dict(one.state_dict())
        assert torch.equal(built(tokens, rows=rows), logits)
    return not any(torch.allclose(a, b) for a, b in itertools.combinations(found, 2))
