"""What a run's memory and messages need of the machine: refused where it is not there, else given to Megatron."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import optimizer_config
from megatron.core.transformer.moe import fused_a2a

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.parallel import build, device
from llada_megatron.parallel.training import distributed_optimizer
from llada_megatron.tools.bench.layouts import MODELS, parity_run
from tests.te_builds import built

EP2 = LayoutConfig(data_parallel=2, expert_parallel=2)


class FusedAdam:
    """As Megatron asks for it: by the names of its arguments."""

    def __init__(self, params, master_weight_dtype, exp_avg_dtype, exp_avg_sq_dtype, use_decoupled_grad): ...


def with_types(precision="bf16", **types):
    run = parity_run(MODELS["dense"], LayoutConfig(), precision=precision)
    return dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, **types))


def test_small_moments_are_refused_without_fused_adam():
    with pytest.raises(
        ConfigError, match="optimizer.exp_avg_dtype: bf16 needs FusedAdam of Transformer Engine on a GPU"
    ):
        distributed_optimizer.build_optimizer(with_types(exp_avg_dtype="bf16"), [])
    with pytest.raises(ConfigError, match="optimizer.main_grads_dtype: bf16 needs training.precision bf16"):
        distributed_optimizer.build_optimizer(with_types("fp32", main_grads_dtype="bf16"), [])


def test_small_moments_reach_megatron(monkeypatch):
    engine = ModuleType("transformer_engine.pytorch.optimizers")
    engine.FusedAdam = FusedAdam
    parents = {name: ModuleType(name) for name in ("transformer_engine", "transformer_engine.pytorch")}
    for name, module in {**parents, engine.__name__: engine}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(optimizer_config, "is_te_min_version", lambda _: True)
    settings = with_types(main_grads_dtype="bf16", exp_avg_dtype="bf16", exp_avg_sq_dtype="fp8").optimizer
    fields = distributed_optimizer._state_types(settings)
    made = MegatronOptimizerConfig(optimizer="adam", use_distributed_optimizer=True, bf16=True, **fields)
    assert made.use_precision_aware_optimizer_no_fp8_or_ds_fp8 and not made.store_param_remainders
    assert (made.main_grads_dtype, made.exp_avg_dtype, made.exp_avg_sq_dtype, made.main_params_dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.uint8,
        torch.float32,
    )
    assert distributed_optimizer._state_types(with_types().optimizer) == {}


@pytest.mark.parametrize("decoupled", [False, True])
def test_gradients_beside_the_weights_are_clipped(decoupled):
    weight = torch.nn.Parameter(torch.zeros(4))
    setattr(weight, "decoupled_grad" if decoupled else "grad", torch.full((4,), 2.0))
    config = SimpleNamespace(clip_grad=1.0, use_precision_aware_optimizer_no_fp8_or_ds_fp8=decoupled)
    distributed_optimizer.clip_gradients(SimpleNamespace(config=config, get_parameters=lambda: [weight]), 4.0)
    clipped = weight.decoupled_grad if decoupled else weight.grad
    torch.testing.assert_close(clipped, torch.full((4,), 0.5))


def test_the_flex_dispatcher_is_refused_without_its_package(monkeypatch):
    run = parity_run(MODELS["sigmoid"], dataclasses.replace(EP2, expert_dispatcher="flex"))
    with pytest.raises(ConfigError, match="layout.expert_dispatcher: flex needs GPUs"):
        build.transformer_config(run.model, run.layout, run.training)
    monkeypatch.setattr(device, "cuda_available", lambda: True)
    for backend, package in {
        "deepep": "deep_ep",
        "hybridep": "deep_ep with HybridEPBuffer .its branch hybrid-ep.",
    }.items():
        layout = dataclasses.replace(run.layout, flex_backend=backend)
        with pytest.raises(ConfigError, match=f"needs the Python package {package}, which cannot be imported"):
            build.transformer_config(run.model, layout, run.training)
    monkeypatch.setattr(fused_a2a, "HAVE_DEEP_EP", True)
    config = build.transformer_config(run.model, run.layout, run.training)
    assert (config.moe_token_dispatcher_type, config.moe_flex_dispatcher_backend) == ("flex", "deepep")


def test_norms_are_run_again_by_transformer_engine_only():
    run = parity_run(MODELS["sigmoid"], EP2, recompute="selective", recompute_modules=["layernorm", "moe_act"])
    with pytest.raises(ConfigError, match="training.recompute_modules: layernorm needs Transformer Engine"):
        build.transformer_config(run.model, run.layout, run.training)
    training = dataclasses.replace(run.training, recompute_modules=["moe_act"])
    assert build.transformer_config(run.model, run.layout, training).recompute_granularity is None


def test_transformer_engines_modules_take_uneven_stages_and_what_is_run_again():
    pipeline = {"pipeline_parallel": 2, "pipeline_layers": [3, 1], "data_parallel": 2, "expert_parallel": 2}
    again = {"precision": "bf16", "recompute": "selective", "recompute_modules": ["layernorm", "moe_act"]}
    quantised = again | {"fp8": {"recipe": "tensorwise"}}
    case = {"model": "tiny-moe", "layout": pipeline, "training": again}
    beside = {"data_parallel": 2, "expert_parallel": 2, "overlap_shared_experts": True}
    eight = case | {"training": quantised}
    cases = [eight | {"rank": 0}, eight | {"rank": 3}, eight | {"layout": beside, "rank": 0}]
    cases.append(case | {"training": again | {"recompute_modules": ["moe_act"]}, "rank": 0})
    first, last, shared, ours = built(cases)
    assert not {"error"} & (first.keys() | last.keys() | shared.keys() | ours.keys()), (first, last, shared, ours)
    assert ours["config"].get("recompute_granularity") is None  # experts in bfloat16 never keep their activations
    assert first["config"]["recompute_granularity"] == last["config"]["recompute_granularity"] == "selective"
    experts = [sum(each["modules"]["TEColumnParallelGroupedLinear"].values()) for each in (first, last, shared)]
    assert experts == [2, 1, 3]  # of four layers the first is dense
    assert shared["config"]["moe_shared_expert_overlap"] and not first["config"]["moe_shared_expert_overlap"]


def test_logits_at_a_time_suit_the_device(monkeypatch):
    assert build.default_logits_chunk_mb() == 256
    monkeypatch.setattr(device, "cuda_available", lambda: True)
    assert build.default_logits_chunk_mb() == 2048
    assert inspect.signature(build.build_chunks).parameters["logits_chunk_mb"].default is None
