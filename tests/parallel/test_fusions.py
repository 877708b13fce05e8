"""Models of every family from Transformer Engine's modules: every layout builds, and every fused kernel is as meant."""

from __future__ import annotations

import pytest

from llada_megatron.llada_moe.config import load_model
from llada_megatron.parallel.fusions import fusion_fields
from tests.te_builds import DENSE_FUSIONS, ROOT, built

LAYOUTS = {
    "TP2.SP": {"tensor_parallel": 2, "sequence_parallel": True},
    "PP2": {"pipeline_parallel": 2},
    "EP2": {"expert_parallel": 2, "data_parallel": 2},
    "CP2": {"context_parallel": 2},
}
MODELS = sorted(path.stem for path in (ROOT / "configs" / "models").glob("*.yaml"))
SMALL = ["num_layers=4"]


def case(model, layout, training=True):
    return {
        "model": model,
        "overrides": SMALL,
        "layout": LAYOUTS[layout],
        "training": {"precision": "bf16"} if training else None,
        "rank": 1 if layout == "PP2" else 0,
    }


def cases():
    moe = {model: load_model(model, []).moe is not None for model in MODELS}
    return [(model, layout) for model in MODELS for layout in LAYOUTS if moe[model] or layout != "EP2"]


@pytest.fixture(scope="module")
def results():
    whole = [*(case(*each) for each in cases()), case("tiny-moe", "CP2", training=False)]
    return dict(zip([*cases(), "sampling"], built(whole), strict=True))


@pytest.mark.parametrize(("model", "layout"), cases())
def test_builds_with_every_fusion_as_meant(results, model, layout):
    got = results[model, layout]
    assert "error" not in got, got
    moe = load_model(model, []).moe
    meant = {
        **DENSE_FUSIONS,
        "moe_grouped_gemm": False,  # in bfloat16 torch's grouped products are taken
        "moe_permute_fusion": moe is not None,
        "moe_router_fusion": moe is not None and moe.expert_capacity == 0,
    }
    assert {name: got["config"][name] for name in meant} == meant
    assert got["devices"] == ["meta"] and got["output_layer"] is False
    linear = {name: counts for name, counts in got["modules"].items() if "Linear" in name}
    assert linear and all(counts.keys() == {"fused"} for counts in linear.values())
    assert not any("Grouped" in name for name in linear)
    assert "RMSNorm" in got["modules"]


def test_without_a_gradient_buffer_nothing_is_added_to_it(results):
    got = results["sampling"]
    assert not got["config"]["gradient_accumulation_fusion"] and got["config"]["apply_rope_fusion"]
    assert all("fused" not in counts for counts in got["modules"].values())


@pytest.mark.parametrize("model", MODELS)
def test_without_transformer_engine_no_kernel_is_fused(model):
    assert not any(fusion_fields(load_model(model, []), training=True).values())


def test_the_program_notices_a_parameter_that_transformer_engine_does_not_have():
    """The stub refuses like the real constructor; without it the tests above would show nothing."""
    from tests import te_stub

    linear = te_stub.make_class("transformer_engine.pytorch", "Linear")
    assert linear(4, 6, device="meta", bias=False).weight.shape == (6, 4)
    with pytest.raises(TypeError, match="fuse_gradients"):
        linear(4, 6, device="meta", fuse_gradients=True)
