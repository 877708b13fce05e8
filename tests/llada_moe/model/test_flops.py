"""Model FLOPs against values computed by hand from the published architectures."""

from __future__ import annotations

import dataclasses

import pytest

from llada_megatron.llada_moe.config.model import ModelConfig, MoEConfig
from llada_megatron.llada_moe.model.flops import FORMULA, block_causal_keys, causal_keys, flops_per_token

LLADA_8B = ModelConfig(
    family="llada", num_layers=32, hidden_size=4096, ffn_hidden_size=12288, num_attention_heads=32,
    num_key_value_heads=32, head_dim=128, vocab_size=126464, max_sequence_length=4096,
    mask_token_id=126336, eos_token_id=126081,
)  # fmt: skip
LLADA_MOE = ModelConfig(
    family="llada_moe", num_layers=16, hidden_size=2048, ffn_hidden_size=8192, num_attention_heads=16,
    num_key_value_heads=16, head_dim=128, vocab_size=157184, max_sequence_length=8192,
    mask_token_id=156895, eos_token_id=156892, qk_norm=True,
    moe=MoEConfig(num_experts=64, top_k=8, expert_ffn_hidden_size=1024),
)  # fmt: skip
LLADA2_FLASH = ModelConfig(
    family="llada2", num_layers=32, hidden_size=4096, ffn_hidden_size=9216, num_attention_heads=32,
    num_key_value_heads=4, head_dim=128, vocab_size=157184, max_sequence_length=32768,
    mask_token_id=156895, eos_token_id=156892, qk_norm=True, rotary_fraction=0.5,
    moe=MoEConfig(
        num_experts=256, top_k=8, expert_ffn_hidden_size=1024, shared_expert_ffn_hidden_size=1024,
        leading_dense_layers=1, score_function="sigmoid", expert_bias=True,
    ),
)  # fmt: skip


def test_llada_8b_by_hand():
    flops = flops_per_token(LLADA_8B, 4096, supervised_share=0.5)
    assert flops.attention_projections == 6 * 32 * 4 * 4096 * 4096
    assert flops.dense_mlp == 6 * 32 * 3 * 4096 * 12288
    assert flops.attention_scores == 12 * 32 * 4096 * 4096
    assert flops.output_layer == 6 * 0.5 * 4096 * 126464
    assert flops.routed_experts == flops.shared_expert == flops.router == 0
    assert flops.total == pytest.approx(49_872_371_712)


def test_llada_8b_is_six_times_its_weights_without_embeddings():
    flops = flops_per_token(LLADA_8B, 4096, supervised_share=0.0)
    norms = 65 * 4096
    assert flops.total - flops.attention_scores == 6 * (6_979_588_096 - norms)


def test_llada_moe_counts_the_experts_a_token_visits():
    flops = flops_per_token(LLADA_MOE, 4096, supervised_share=1.0)
    assert flops.routed_experts == 6 * 16 * 8 * 3 * 2048 * 1024
    assert flops.router == 6 * 16 * 2048 * 64
    assert flops.dense_mlp == 0
    assert flops.output_layer == 6 * 2048 * 157184
    active = 16 * (4 * 2048 * 2048 + 8 * 3 * 2048 * 1024 + 2048 * 64) + 2048 * 157184
    assert flops.total == 6 * active + 12 * 16 * 4096 * 2048


def test_llada2_flash_counts_grouped_queries_dense_layer_and_shared_expert():
    flops = flops_per_token(LLADA2_FLASH, 4096)
    assert flops.attention_projections == 6 * 32 * (2 * 4096 * 4096 + 2 * 4096 * 512)
    assert flops.dense_mlp == 6 * 3 * 4096 * 9216
    assert flops.shared_expert == 6 * 31 * 3 * 4096 * 1024
    assert flops.routed_experts == 8 * flops.shared_expert


def test_causal_attention_costs_half_and_everything_else_the_same():
    full = flops_per_token(LLADA_8B, 4096)
    causal = flops_per_token(LLADA_8B, 4096, keys_per_query=causal_keys(4096))
    assert causal.attention_scores == full.attention_scores * 4097 / 8192
    assert dataclasses.replace(causal, attention_scores=0) == dataclasses.replace(full, attention_scores=0)


@pytest.mark.parametrize(("length", "block"), [(4096, 32), (70, 32), (5, 32), (7, 1), (64, 64)])
def test_block_causal_queries_see_up_to_the_end_of_their_block(length, block):
    seen = [min(length, (position // block + 1) * block) for position in range(length)]
    assert block_causal_keys(length, block) == pytest.approx(sum(seen) / length)


def test_a_noisy_and_a_clean_copy_cost_twice_but_for_the_output_layer():
    once, twice = (flops_per_token(LLADA2_FLASH, 4096, keys_per_query=2000, copies=copies) for copies in (1, 2))
    parts = twice.parts()
    assert parts.pop("output_layer") == once.output_layer
    assert all(count == 2 * once.parts()[name] > 0 for name, count in parts.items())


def test_share_outside_zero_to_one_is_refused():
    with pytest.raises(ValueError, match="supervised_share"):
        flops_per_token(LLADA_8B, 8, supervised_share=1.5)


def test_formula_names_every_symbol_it_uses():
    for symbol in ("h hidden", "H heads", "G key-value", "d head size", "E experts", "V vocabulary", "K keys"):
        assert symbol in FORMULA
