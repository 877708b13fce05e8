"""Each way to compute attention equals a naive softmax in float64: the result and all gradients, over drawn batches."""

from __future__ import annotations

import ast
import inspect
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from megatron.core.extensions import transformer_engine as megatron_engine
from megatron.core.transformer.enums import AttnMaskType

from llada_megatron.llada_moe.model.attention import engine_attention, per_document, varlen
from tests import te_stub
from tests.llada_moe.model.attention.naive import (
    Case,
    attention_over_lengths,
    cases,
    evaluated,
    expected,
    largest_error,
)

EXACT = 1e-6
DOT_PRODUCT_ATTENTION = set(te_stub.forward("transformer_engine.pytorch", "DotProductAttention").parameters)
"""Arguments of Transformer Engine's attention, which Megatron calls with what it is given by name."""


@settings(derandomize=True, deadline=None, max_examples=150)
@given(cases())
def test_one_product_per_document(case):
    packed = case.packed()
    found = evaluated(lambda q, k, v: per_document.attend(q, k, v, packed, None), case)
    assert largest_error(found, expected(case)) < EXACT


@pytest.mark.parametrize("block", [5, 32, 300])
def test_bands_of_small_blocks_share_the_gradient_of_their_keys(block):
    case = Case(1300, ((900, 400),), block, 1, 2, 2, 1)
    packed = case.packed()
    found = evaluated(lambda q, k, v: per_document.attend(q, k, v, packed, None), case)
    assert largest_error(found, expected(case)) < EXACT


def in_float64(packed, causal: bool, starts: tuple[torch.Tensor, torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
    queries, keys = (part.tolist() for part in starts)
    assert (queries[-1], keys[-1]) == (tensors[0].size(0), tensors[1].size(0))
    assert packed.once(engine_attention.cumulative_lengths, torch.device("cpu"))[0] is starts[0]  # made once
    return attention_over_lengths(*tensors, queries, keys, causal)


def most(starts: torch.Tensor) -> int:
    return int(starts.diff().max())


@settings(derandomize=True, deadline=None, max_examples=60)
@given(cases(blocks=(None, 1)))
def test_what_torchs_varlen_is_given_means_the_pattern(case):
    packed = case.packed()
    signature = inspect.signature(varlen.operation())

    def attend(q, k, v):
        given = varlen.arguments(q, k, v, packed, None, varlen.operation())
        bound = signature.bind(**given).arguments
        starts = bound["cu_seq_q"], bound["cu_seq_k"]
        assert all(start.dtype == torch.int32 for start in starts)
        assert most(starts[0]) <= bound["max_q"] <= q.size(0) and most(starts[1]) <= bound["max_k"] <= k.size(0)
        assert bound.get("enable_gqa", True) == (q.size(2) != k.size(2)) or "enable_gqa" not in bound
        causal = bound.get("window_size", (-1, -1)) == (-1, 0)
        assert causal == (case.block == 1)
        out = in_float64(packed, causal, starts, bound["query"], bound["key"], bound["value"])
        return out.view(q.size(1), q.size(0), -1).transpose(0, 1)

    assert largest_error(evaluated(attend, case, torch.float64), expected(case)) < EXACT


def varlen_of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    """The signature that the first release had."""


def test_the_first_varlen_takes_a_flag_and_no_scale():
    case = Case(8, ((3, 5),), 1, 0, 1, 4, 2)
    query, key, value, _ = case.inputs()
    given = varlen.arguments(query, key, value, case.packed(), None, varlen_of_torch_2_10)
    assert given["is_causal"] is True and set(given) <= set(inspect.signature(varlen_of_torch_2_10).parameters)
    with pytest.raises(ValueError, match="takes no scale"):
        varlen.arguments(query, key, value, case.packed(), 0.5, varlen_of_torch_2_10)


@cache
def megatrons_arguments() -> list[str]:
    """Of the installed Megatron's TEDotProductAttention.forward, read from its file: without Transformer Engine the
    class is none."""
    tree = ast.parse(Path(megatron_engine.__file__).read_text(encoding="utf-8"))
    (found,) = (
        method
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name == "TEDotProductAttention"
        for method in node.body
        if isinstance(method, ast.FunctionDef) and method.name == "forward"
    )
    return [argument.arg for argument in found.args.args]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(cases(blocks=(None, 1)).filter(lambda case: case.block is None or case.ranks == 1))
def test_what_transformer_engine_is_given_means_the_pattern(case):
    packed = case.packed()

    def attend(q, k, v):
        given = engine_attention.arguments(q, k, v, packed)
        assert set(given) <= set(megatrons_arguments())
        lengths = given["packed_seq_params"]
        named = {name for name, value in vars(lengths).items() if value is not None}
        assert named <= DOT_PRODUCT_ATTENTION and lengths.qkv_format == "thd"
        starts = lengths.cu_seqlens_q, lengths.cu_seqlens_kv
        assert most(starts[0]) <= lengths.max_seqlen_q <= q.size(0)
        assert most(starts[1]) <= lengths.max_seqlen_kv <= k.size(0)
        causal = given["attn_mask_type"] is AttnMaskType.padding_causal
        assert causal == (case.block == 1) and (causal or given["attn_mask_type"] is AttnMaskType.padding)
        out = in_float64(packed, causal, starts, given["query"], given["key"], given["value"])
        return out.view(q.size(1), q.size(0), -1).transpose(0, 1)

    assert largest_error(evaluated(attend, case, torch.float64), expected(case)) < EXACT
