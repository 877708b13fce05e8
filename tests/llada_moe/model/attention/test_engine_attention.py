"""The core attention of a model that is built from Transformer Engine's modules, with a stand-in for them that computes
what it is given on the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.extensions import transformer_engine as megatron_engine
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.llada_moe.model.attention import engine_attention, pattern_attention
from llada_megatron.llada_moe.model.attention.backends import Backend, Choice
from llada_megatron.llada_moe.model.patterns import CAUSAL, FULL
from tests.llada_moe.model.attention.naive import Case, attention_over_lengths, evaluated, expected, largest_error


class StandInAttention(torch.nn.Module):
    """Megatron's TEDotProductAttention, by its arguments."""

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        attention_dropout=None,
        softmax_scale=None,
        k_channels=None,
        v_channels=None,
        num_splits=None,
        cp_comm_type="p2p",
        pg_collection=None,
    ):
        assert hasattr(pg_collection, "tp") and hasattr(pg_collection, "cp")
        super().__init__()
        self.config, self.mask_type, self.scale = config, attn_mask_type, softmax_scale

    def forward(self, query, key, value, attention_mask, attn_mask_type, attention_bias=None, packed_seq_params=None):
        starts = packed_seq_params.cu_seqlens_q.tolist(), packed_seq_params.cu_seqlens_kv.tolist()
        return attention_over_lengths(query, key, value, *starts, attn_mask_type is AttnMaskType.padding_causal)

    def get_extra_state(self):
        raise AssertionError("nothing of attention in FP8 is saved")


@pytest.fixture
def module(monkeypatch):
    """The module as a pipeline stage of two context ranks builds it, on a rank of its own."""
    monkeypatch.setattr(megatron_engine, "TEDotProductAttention", StandInAttention)
    engine_attention.engine_class.cache_clear()
    chosen = Choice(Backend.ENGINE, "")
    monkeypatch.setattr(pattern_attention, "attention_backend", lambda *_, engine, **__: engine and chosen)
    groups = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1, rank=lambda: 0), tp=None)
    config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, context_parallel_size=2)
    yield engine_attention.EnginePatternAttention(
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType.no_mask,
        attention_type="self",
        softmax_scale=0.5,
        pg_collection=groups,
    )
    engine_attention.engine_class.cache_clear()


@pytest.mark.parametrize("pattern", [FULL, CAUSAL])
def test_it_attends_to_the_documents_of_all_sequences_in_one_call(module, pattern):
    case = Case(20, ((4, 1, 15), (20,), (13, 7)), pattern.block, 0, 1, 4, 2)
    module.pattern = pattern
    found = evaluated(lambda q, k, v: module(q, k, v, case.boundaries), case, torch.float64)
    assert largest_error(found, expected(case)) < 1e-12
    assert found[0].shape == (20, 3, 32) and found[0].is_contiguous()


def test_the_engine_knows_no_context_ranks_and_has_no_state_of_its_own(module):
    assert module.engine.config.context_parallel_size == 1 and module.config.context_parallel_size == 2
    assert (module.engine.mask_type, module.engine.scale) == (AttnMaskType.padding, 0.5)
    assert module.state_dict() == {} and [name for name, _ in module.named_children()] == ["engine"]
    module.load_state_dict({})
