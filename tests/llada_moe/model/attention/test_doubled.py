"""Attention over `[x_t ; x_0]` equals a naive softmax in float64, however it is computed: result and all gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from llada_megatron.llada_moe.model.attention import decomposed
from llada_megatron.llada_moe.model.attention.backends import Backend, attention_backend
from llada_megatron.llada_moe.model.attention.doubled_documents import CHUNK_QUERIES, pack_doubled
from llada_megatron.llada_moe.model.context_slices import Run
from llada_megatron.llada_moe.model.patterns import AttentionPattern, segments
from llada_megatron.tools.bench.attention import attention_module
from tests.llada_moe.model.attention.naive import DoubledCase, doubled_cases, evaluated, expected, largest_error

EXACT = 1e-6


def by_merging(packed, q, k, v):
    return decomposed.attend(q, k, v, packed, None)


def in_one_product(packed, q, k, v):
    found = decomposed.in_one(*(tensor.permute(1, 2, 0, 3) for tensor in (q, k, v)), packed, None)
    return found.permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize("attend", [by_merging, in_one_product])
@settings(derandomize=True, deadline=None, max_examples=40)
@given(case=doubled_cases())
def test_it_is_a_softmax_over_what_equation_3_lets_a_query_see(attend, case):
    assert largest_error(evaluated(partial(attend, case.packed()), case), expected(case)) < EXACT


@pytest.mark.parametrize(("block", "causal"), [(1, False), (32, False), (300, False), (32, True), (300, True)])
def test_documents_of_many_chunks(block, causal):
    case = DoubledCase(1600, ((750, 50),), block, 0, 1, 4, 2, causal)
    assert largest_error(evaluated(partial(by_merging, case.packed()), case), expected(case)) < EXACT


@pytest.mark.parametrize("block", [32, 300])
def test_a_rank_of_several_holds_some_noisy_or_clean_queries(block):
    for rank in range(4):
        case = DoubledCase(1200, ((600,),), block, rank, 4, 2, 1)
        assert largest_error(evaluated(partial(by_merging, case.packed()), case), expected(case)) < EXACT


def test_a_causal_clean_half_needs_no_mask_larger_than_a_chunk_behind_blocks_of_any_length():
    case = DoubledCase(2048, ((1024,),), 512, 0, 1, 2, 2, True)
    cut = [decomposed.parts(chunk, case.packed(), case.inputs()[0]) for chunk in case.packed().rows[0]]
    masks = [part.mask.shape for each in cut for part in each.own if part.mask is not None]
    assert set(masks) == {(CHUNK_QUERIES, CHUNK_QUERIES)}
    assert case.pattern.keys_per_query(1024) == case.seen().sum() / 2048


def test_masks_are_as_large_as_a_chunk_and_what_is_kept_is_linear_in_length():
    kept = {}
    for half in (1024, 4096):
        case = DoubledCase(2 * half, ((half,),), 32, 0, 1, 2, 2)
        packed, saved = case.packed(), []
        query, key, value, _ = (part.requires_grad_() for part in case.inputs())
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, into=saved: into.append(tensor) or tensor, id):
            decomposed.attend(query, key, value, packed, None)
        kept[half] = sum(tensor.numel() for tensor in saved)
        widest = {part.mask.shape for chunk in packed.rows[0] for part in decomposed.parts(chunk, packed, query).own}
        assert widest == {(2 * CHUNK_QUERIES, 2 * CHUNK_QUERIES)}
    assert kept[4096] == 4 * kept[1024] < 5 * 4096 * 2 * 2 * 9


def test_the_module_computes_it_with_the_rows_of_a_batch_and_is_told_apart():
    case = DoubledCase(24, ((5, 7), (12,)), 3, 0, 1, 4, 4)
    module = attention_module(4, 8, case.pattern)
    assert largest_error(evaluated(lambda q, k, v: module(q, k, v, case.boundaries), case), expected(case)) < EXACT
    whole = DoubledCase(24, ((12,), (12,)), 3, 0, 1, 4, 4)
    assert largest_error(evaluated(lambda q, k, v: module(q, k, v, None), whole), expected(whole)) < EXACT


@pytest.mark.parametrize("attend", [by_merging, in_one_product])
def test_no_value_of_a_tensor_is_asked_for(attend):
    packed = DoubledCase(64, ((5, 20, 7), (32,)), 6, 0, 1, 4, 2).packed()
    with FakeTensorMode():
        tensors = [torch.randn(64, 2, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
        out = attend(packed, *tensors)
        out.backward(torch.ones_like(out))
    decomposed.chunk_mask.cache_clear()  # of masks without values
    assert out.shape == (64, 2, 32) and all(tensor.grad.shape == tensor.shape for tensor in tensors)


def test_bf16_loses_no_more_than_its_own_digits():
    case = DoubledCase(800, ((400,),), 32, 0, 1, 2, 1)
    found = evaluated(partial(by_merging, case.packed()), case, torch.bfloat16)
    assert largest_error(found, expected(case)) < 2e-2


def test_halves_that_differ_and_blocks_that_are_missing_are_refused():
    with pytest.raises(ValueError, match="without blocks the noisy half sees nothing"):
        AttentionPattern(None, doubled=True)
    with pytest.raises(ValueError, match="no clean half to be causal"):
        AttentionPattern(2, causal_clean=True)
    with pytest.raises(ValueError, match="sequence 0: the noisy half and the clean half have different segments"):
        pack_doubled(segments(torch.tensor([0, 3, 8, 16]), 16), AttentionPattern(2, doubled=True), 16, [Run(0, 16)])


def test_who_computes_it(monkeypatch):
    from llada_megatron.llada_moe.model.attention import backends

    pattern = AttentionPattern(32, doubled=True)
    monkeypatch.setattr(backends, "_against_flex", lambda *_: None)
    attention_backend.cache_clear()
    assert attention_backend(pattern, "cpu", torch.float32).backend is Backend.DECOMPOSED
    assert attention_backend(pattern, "cuda", torch.float32).backend is Backend.DECOMPOSED
    chosen = attention_backend(pattern, "cuda", torch.bfloat16, engine=True)
    attention_backend.cache_clear()
    assert chosen.backend is Backend.FLEX and "no mask of a noisy and a clean half" in chosen.reason
