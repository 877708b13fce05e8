"""Every family builds from Transformer Engine's modules with every FP8 recipe under every layout, as is meant."""

from __future__ import annotations

import itertools

import pytest

from llada_megatron.llada_moe.config import load_run
from tests.te_builds import DENSE_FUSIONS, built

FAMILIES = {
    "llada": ("llada-8b", []),
    "qwen3": ("llada-8b", ["family=qwen3"]),
    "llada_moe": ("llada-moe-7b-a1b", []),
    "qwen3_moe": ("llada-moe-7b-a1b", ["family=qwen3_moe"]),
    "llada2": ("llada2-mini", []),
}
LAYOUTS = {
    "TP2.SP": {"tensor_parallel": 2, "sequence_parallel": True},
    "PP2": {"pipeline_parallel": 2},
    "EP2": {"expert_parallel": 2, "data_parallel": 2},
    "CP2": {"context_parallel": 2},
}
CLASSES = {
    "delayed": "TEDelayedScaling",
    "tensorwise": "Float8CurrentScaling",
    "blockwise": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
WITH_WEIGHTS = ("tensorwise", "blockwise")
CASES = [
    (family, recipe, layout)
    for family, recipe, layout in itertools.product(FAMILIES, CLASSES, LAYOUTS)
    if layout != "EP2" or family in ("llada_moe", "qwen3_moe", "llada2")
]
SAMPLED = [
    ("llada", "tensorwise", "TP2.SP"),
    ("llada_moe", "blockwise", "EP2"),
    ("llada2", "tensorwise", "EP2"),
]


def training(recipe):
    """With every key that the recipe can have."""
    first = {} if recipe == "delayed" else {"num_layers_at_start_in_bf16": 1}
    weights = {"param_gather": True} if recipe in WITH_WEIGHTS else {}
    return {"precision": "bf16", "fp8": {"recipe": recipe, **first, **weights}}


@pytest.fixture(scope="module")
def results():
    cases = [
        {
            "model": FAMILIES[family][0],
            "overrides": ["num_layers=2", *FAMILIES[family][1]],
            "layout": LAYOUTS[layout],
            "training": training(recipe),
            "rank": 1 if layout == "PP2" else 0,
        }
        for family, recipe, layout in CASES
    ]
    sampled = [
        {
            "model": FAMILIES[family][0],
            "overrides": ["num_layers=2", *FAMILIES[family][1]],
            "layout": LAYOUTS[layout],
            "training": training("blockwise"),
            "sampling": recipe,
        }
        for family, recipe, layout in SAMPLED
    ]
    return dict(zip([*CASES, *(("sampled", *case) for case in SAMPLED)], built(cases + sampled), strict=True))


@pytest.mark.parametrize(("family", "recipe", "layout"), SAMPLED)
def test_a_model_is_opened_in_fp8(results, family, recipe, layout):
    got, trained = results["sampled", family, recipe, layout], results[family, recipe, layout]
    assert "error" not in got, got
    assert (got["recipe"], got["parameters"]) == (CLASSES[recipe], trained["parameters"])
    assert got["config"]["fp8_param"] and not got["config"]["moe_router_padding_for_quantization"]
    assert got["config"]["num_layers_at_start_in_bf16"] == 1
    assert got["modules"].keys() == trained["modules"].keys()
    linear = {name for name in got["modules"] if "Linear" in name and "Grouped" not in name}
    assert set(got["padded"]) == linear and not trained["padded"]


@pytest.mark.parametrize(("family", "recipe", "layout"), CASES)
def test_builds_with_the_recipe_that_is_meant(results, family, recipe, layout):
    got = results[family, recipe, layout]
    assert "error" not in got, got
    assert got["recipe"] == CLASSES[recipe] and got["devices"] == ["meta"]
    meant = {
        "fp8": "hybrid" if recipe in ("delayed", "tensorwise") else "e4m3",
        "fp8_recipe": recipe,
        "fp8_param": recipe in WITH_WEIGHTS,
        "first_last_layers_bf16": recipe != "delayed",
        "moe_router_padding_for_quantization": family not in ("llada", "qwen3"),
        "fp8_dot_product_attention": False,
    }
    assert {name: got["config"][name] for name in meant} == meant


@pytest.mark.parametrize(("family", "recipe", "layout"), CASES)
def test_every_fusion_is_as_meant_and_experts_are_transformer_engines(results, family, recipe, layout):
    """Experts above all: torch's grouped products, which a run in bf16 takes, know no FP8."""
    got = results[family, recipe, layout]
    moe = family not in ("llada", "qwen3")
    meant = {
        **DENSE_FUSIONS,
        "moe_grouped_gemm": moe,
        "moe_permute_fusion": moe,
        "moe_router_fusion": moe,
    }
    assert {name: got["config"][name] for name in meant} == meant and got["output_layer"] is False
    layers = 1 if layout == "PP2" else 2
    with_experts = (1 if family == "llada2" else layers) if moe else 0  # llada2's first layer is dense
    assert got["experts"] == ["TEGroupedMLP"] * with_experts
    for name in ("TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"):
        assert got["modules"].get(name, {}) == ({"fused": with_experts} if moe else {})
    attention = got["modules"]["TERowParallelLinear"]["fused"], got["modules"]["TEColumnParallelLinear"]["fused"]
    assert attention[0] == attention[1] >= layers and "plain" not in got["modules"]["TERowParallelLinear"]


@pytest.mark.parametrize("run", ["llada-8b-pretrain", "llada-moe-7b-a1b-pretrain", "llada2-mini-pretrain"])
@pytest.mark.parametrize("recipe", CLASSES)
def test_the_shipped_runs_can_be_in_fp8(run, recipe):
    again = ["training.recompute=none", "training.recompute_modules=[]"] if recipe == "delayed" else []
    assert load_run(run, [f"training.fp8.recipe={recipe}", *again]).training.fp8.recipe == recipe
