"""`llada bench train` compares like with like: sizes, function, attention; and adds its times up correctly."""

from __future__ import annotations

import dataclasses
import importlib
import sys

import pytest
import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.llada_moe.model.head import Targets
from llada_megatron.llada_moe.model.transformer import build_model
from llada_megatron.parallel.build import transformer_config
from llada_megatron.tools.bench import train
from llada_megatron.tools.bench.measurement import KINDS, OPTIMIZER, breakdown, single_process
from llada_megatron.tools.bench.our_step import masked_batch

SMALL = {
    "dense": dataclasses.replace(train.MODELS["dense"], num_layers=2, hidden_size=64, ffn_hidden_size=96,
                                 num_attention_heads=4, num_key_value_heads=4, head_dim=16, vocab_size=128),
    "moe": dataclasses.replace(train.MODELS["moe"], num_layers=1, hidden_size=64, num_attention_heads=4,
                               num_key_value_heads=4, head_dim=16, vocab_size=128,
                               moe=dataclasses.replace(train.MODELS["moe"].moe, num_experts=8, top_k=2)),
}  # fmt: skip


@pytest.fixture
def transformers_step():
    pytest.importorskip("transformers")
    return importlib.import_module("llada_megatron.tools.bench.transformers_step")


@pytest.fixture
def one_process():
    with single_process():
        yield


def copy_to_llama(ours, llama):
    """Our weights in LLaMA's places; Megatron keeps q, k, v of each head group together, and gate above up."""
    state = dict(ours.named_parameters())
    llama.model.embed_tokens.weight.data.copy_(state["embedding.word_embeddings.weight"])
    llama.lm_head.weight.data.copy_(state["output_layer.weight"])
    llama.model.norm.weight.data.copy_(state["decoder.final_layernorm.weight"])
    for i, layer in enumerate(llama.model.layers):
        prefix = f"decoder.layers.{i}."
        heads = state[prefix + "self_attention.linear_qkv.weight"].view(4, 3, 16, 64)
        for j, projection in enumerate((layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)):
            projection.weight.data.copy_(heads[:, j].reshape(64, 64))
        layer.self_attn.o_proj.weight.data.copy_(state[prefix + "self_attention.linear_proj.weight"])
        gate, up = state[prefix + "mlp.linear_fc1.weight"].chunk(2)
        layer.mlp.gate_proj.weight.data.copy_(gate)
        layer.mlp.up_proj.weight.data.copy_(up)
        layer.mlp.down_proj.weight.data.copy_(state[prefix + "mlp.linear_fc2.weight"])
        layer.input_layernorm.weight.data.copy_(state[prefix + "input_layernorm.weight"])
        layer.post_attention_layernorm.weight.data.copy_(state[prefix + "pre_mlp_layernorm.weight"])


def test_llama_with_our_weights_has_our_loss(transformers_step, one_process):
    model = SMALL["dense"]
    ours = build_model(model, transformer_config(model, LayoutConfig()))
    other = transformers_step.TransformersStep(transformers_step.build_peer(model, 16), 1e-4, 1.0)
    copy_to_llama(ours, other.model)
    batch = masked_batch(model, 2, 16, seed=0)
    weights = batch.masked.float() / batch.masked.sum()
    mine = ours(batch.inputs, targets=Targets.of(batch.labels, weights)).sum()
    torch.testing.assert_close(other.loss(batch), mine, rtol=1e-5, atol=0)
    other._rows_only = True
    torch.testing.assert_close(other.loss(batch), mine, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_the_peer_attends_in_both_directions_and_is_as_large(transformers_step, one_process, name):
    model = SMALL[name]
    other = transformers_step.build_peer(model, 16, "eager" if model.moe else None).eval()
    ids = torch.arange(16)[None]
    changed = ids.clone()
    changed[0, -1] = 99
    with torch.no_grad():
        assert not torch.allclose(other(input_ids=ids).logits[0, 0], other(input_ids=changed).logits[0, 0])
    ours = build_model(model, transformer_config(model, LayoutConfig()))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (ours, other)]
    assert abs(sizes[0] - sizes[1]) <= 2 * model.num_layers * model.hidden_size


def test_both_sides_train(transformers_step, one_process):
    from llada_megatron.tools.bench.our_step import OurStep, run_config

    model = SMALL["moe"]
    batch = masked_batch(model, 2, 16, seed=0)
    for step in (
        OurStep(run_config(model, 2, 16, 1e-2, 1.0)).step,
        transformers_step.TransformersStep(transformers_step.build_peer(model, 16, "grouped_mm"), 1e-2, 1.0).step,
    ):
        first, *_, last = [step(batch) for _ in range(10)]
        assert 4 < first < 6 and last < first - 0.5


def test_a_missing_transformers_is_said_with_what_to_install(transformers_step, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ResourceError, match=r"pip install .*\[dev\]"):
        transformers_step.build_peer(SMALL["dense"], 16)


def test_batched_mm_is_skipped_where_its_copies_do_not_fit(transformers_step):
    assert "batched_mm" in transformers_step.feasible_implementations(SMALL["moe"], 32, free_bytes=1e12)
    assert transformers_step.feasible_implementations(SMALL["moe"], 32, free_bytes=1e3) == ["eager", "grouped_mm"]
    assert transformers_step.feasible_implementations(SMALL["dense"], 32, free_bytes=1e12) == []


def test_ratios_are_taken_turn_by_turn():
    turns = train.Turns({"ours": [1.0, 2.0, 10.0], "peer": [1.5, 3.0, 5.0]}, peaks=[10.0, 5.0, 1.0])
    assert turns.speedup("peer") == 1.5
    assert turns.tokens_per_second("ours", 8) == 4.0
    assert turns.utilization("ours", 5.0) == 0.5


def test_a_batch_supervises_exactly_half_and_depends_on_the_seed():
    batch = masked_batch(SMALL["dense"], 3, 16, seed=1)
    assert batch.masked.sum(dim=1).tolist() == [8, 8, 8]
    assert torch.equal(batch.inputs[~batch.masked], batch.labels[~batch.masked])
    assert not torch.equal(batch.labels, masked_batch(SMALL["dense"], 3, 16, seed=2).labels)


def test_the_breakdown_adds_up_and_sees_the_optimizer():
    weight = torch.nn.Parameter(torch.randn(256, 256))
    optimizer = torch.optim.AdamW([weight])

    def step():
        (weight @ weight).sum().backward()
        optimizer.step()

    step()
    shares = breakdown(step)
    assert list(shares) == list(KINDS)
    assert sum(shares.values()) == pytest.approx(1.0, abs=0.02)
    assert shares[OPTIMIZER] > 0 and shares["matrix products"] > 0
