"""What Megatron is told of FP8, on which devices it is refused, and what its utilisation is measured against."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from llada_megatron.launch import resources
from llada_megatron.llada_moe.config import load_model, load_run
from llada_megatron.llada_moe.config.fp8 import FP8Config
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.llada_moe.model import accelerations
from llada_megatron.parallel import build
from llada_megatron.parallel.fp8 import recipes
from llada_megatron.parallel.training import peak

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")


@pytest.mark.parametrize("family", ["tiny-dense", "tiny-moe"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_fields_that_megatron_is_given(monkeypatch, recipe, family):
    from megatron.core.transformer import transformer_config

    monkeypatch.setattr(transformer_config, "is_te_min_version", lambda version: True)  # asked for models with experts
    model, experts = load_model(family), "moe" in family
    first = 0 if recipe == "delayed" else 1
    chosen = FP8Config(recipe=recipe, num_layers_at_start_in_bf16=first)
    training = dataclasses.replace(load_run("demo").training, precision="bf16", fp8=chosen)
    config = build.transformer_config(model, LayoutConfig(), training)
    expected = "e4m3" if recipe in ("blockwise", "mxfp8") else "hybrid"
    assert (config.fp8, config.fp8_recipe, config.fp8_param) == (expected, recipe, False)
    assert config.moe_router_padding_for_quantization is experts
    assert (config.first_last_layers_bf16, config.num_layers_at_start_in_bf16) == (first == 1, first)
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1024, "max")
    plain = build.transformer_config(model, LayoutConfig(), training.without_fp8())
    assert plain.fp8 is None and not plain.moe_router_padding_for_quantization


CAN = {
    ((8, 0), "12.9"): (),
    ((8, 9), "13.0"): ("delayed", "tensorwise"),
    ((9, 0), "12.8"): ("delayed", "tensorwise"),
    ((9, 0), "13.0"): ("delayed", "tensorwise", "blockwise"),
    ((10, 0), "13.0"): RECIPES,
    ((12, 0), "13.0"): ("delayed", "tensorwise", "blockwise"),
}


@pytest.mark.parametrize(("device", "able"), CAN.items())
def test_a_recipe_needs_a_device_that_has_it(device, able):
    reasons = {recipe: recipes.obstacle(recipe, *device) for recipe in RECIPES}
    assert tuple(recipe for recipe in RECIPES if reasons[recipe] is None) == able
    for reason in filter(None, reasons.values()):
        assert reason.endswith("remove training.fp8 to train in bf16") and ("use recipe" in reason) == bool(able)


def test_a_run_in_fp8_is_refused_on_a_cpu_before_anything_is_done(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    run = load_run("demo", ["training.precision=bf16", "training.fp8.recipe=tensorwise"])
    with pytest.raises(ResourceError, match=r"training\.fp8 \(recipe tensorwise\) needs a GPU with FP8, and none"):
        resources.check_machine(run)
    resources.check_machine(dataclasses.replace(run, training=run.training.without_fp8()), oversubscribe=True)


@pytest.mark.parametrize(
    ("capability", "engine", "message"),
    [
        ((8, 0), True, r"GPU 0 \(A card\): recipe blockwise needs compute capability 9.0 or higher, this one has 8.0"),
        ((9, 0), False, "needs Transformer Engine: its import fails; or remove training.fp8 to train in bf16"),
        ((9, 0), True, None),
    ],
)
def test_a_run_in_fp8_needs_the_card_and_transformer_engine(monkeypatch, capability, engine, message):
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        get_device_capability=lambda index: capability,
        get_device_name=lambda index: "A card",
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    state = accelerations.Acceleration(engine, "its import fails")
    monkeypatch.setattr(accelerations, "transformer_engine", lambda: state)
    recipes.require_device(None)
    if message is None:
        recipes.require_device(FP8Config(recipe="blockwise"))
        return
    with pytest.raises(ResourceError, match=message):
        recipes.require_device(FP8Config(recipe="blockwise"))


def test_utilisation_is_of_the_precision_used_and_says_which(monkeypatch):
    training = dataclasses.replace(load_run("demo").training, precision="bf16")
    assert peak.product_types(training) == [torch.bfloat16]
    in_fp8 = peak.product_types(dataclasses.replace(training, fp8=FP8Config(recipe="blockwise")))
    assert [peak.PRECISION_NAMES[dtype] for dtype in in_fp8] == ["FP8", "bf16"]

    def absent(*_, **__):
        raise NotImplementedError

    monkeypatch.setattr(torch, "_scaled_mm", absent)
    assert not peak.has_product("cpu", torch.float8_e4m3fn) and peak.has_product("cpu", torch.float32)


def test_the_fp8_product_that_is_measured_is_a_product(monkeypatch):
    monkeypatch.setattr(peak, "_FIRST_SIZE", 16)
    if not peak.has_product("cpu", torch.float8_e4m3fn):
        pytest.skip("this torch has no FP8 product on a CPU")
    torch.manual_seed(0)
    made = peak._product(16, torch.device("cpu"), torch.float8_e4m3fn)()
    torch.manual_seed(0)
    operand = torch.randn(16, 16).to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(made.float(), operand @ operand.t(), rtol=1e-2, atol=1e-2)
