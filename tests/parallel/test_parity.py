"""Every layout computes what one process computes: loss, every gradient, gradient norm.

The weights after updates are compared in `training/test_optimizer.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies

from llada_megatron.llada_moe.config import validate_run
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.tools.bench import parity
from llada_megatron.tools.bench.layouts import (
    DENSE_LAYOUTS,
    EDITING,
    MODELS,
    MOE_LAYOUTS,
    parity_run,
    with_operations,
)
from tests.ranks import run_ranks

CORE = [
    *(("dense", name) for name in ("TP2.SP", "PP2 interleaved", "CP2", "DP2")),
    *(("tied", name) for name in ("TP2.SP.PP2", "PP2 uneven")),
    *(("softmax", name) for name in ("EP2", "TP2.SP.EP2", "CP2")),
    *(("sigmoid", name) for name in ("TP2.SP", "EP2.ETP2", "TP2.SP.PP2.EP2", "PP2.EP2 uneven")),
    *(("blocks", name) for name in ("TP2.SP", "EP2", "PP2", "CP2")),
]
"""The fast part of the layouts; `llada bench parity` runs all."""
BLOCK_CAUSAL = (("block_size", parity.BLOCK_SIZE),)
AUTOREGRESSIVE = (("objective", "autoregressive"),)


@functools.cache
def one_process(model: str, changes: tuple[tuple[str, object], ...] = ()) -> parity.Gradients:
    return parity.measure(parity_run(MODELS[model], LayoutConfig(), **dict(changes)))


@pytest.mark.parametrize(("model", "name"), CORE)
def test_layout_equals_one_process(model, name):
    layout = (DENSE_LAYOUTS if model in ("dense", "tied") else MOE_LAYOUTS)[name]
    error, where = parity.compare(one_process(model), parity.measure(parity_run(MODELS[model], layout)))
    assert error <= parity.GOAL, where


@pytest.mark.parametrize(("name", "changes"), [("CP2", BLOCK_CAUSAL), ("PP2", BLOCK_CAUSAL), ("CP4", AUTOREGRESSIVE)])
def test_causal_layout_equals_one_process(name, changes):
    run = parity_run(MODELS["dense"], DENSE_LAYOUTS[name], **dict(changes))
    error, where = parity.compare(one_process("dense", changes), parity.measure(run))
    assert error <= parity.GOAL, where


def noisy(model: str, layout: LayoutConfig, changes: dict[str, object], **keys: object) -> RunConfig:
    """A run that has noise on the embeddings of masked tokens at the step that is measured."""
    run = parity_run(with_operations(MODELS[model]), layout, editing=EDITING, **changes)
    noise = {"mask_embedding_noise": 0.5, "mask_embedding_noise_steps": 4} | keys
    return dataclasses.replace(run, objective=dataclasses.replace(run.objective, **noise))


@pytest.mark.parametrize(
    ("model", "names"), [("dense", ["CP2", "PP2 interleaved"]), ("blocks", ["TP2.SP.CP2", "TP2.SP.EP2"])]
)
def test_layout_of_block_diffusion_equals_one_process(model, names):
    """With all that a conversion from an autoregressive model may have in its first steps, and with wrong tokens."""
    halves = {"objective": "block_diffusion", "block_size": parity.BLOCK_SIZE}
    pairs = {"complementary_masks": True, "time_per": "block", "time_sampling": "stratified"}
    alone = parity.measure(noisy(model, LayoutConfig(), halves, **pairs))
    if model == "dense":
        quiet = parity.measure(noisy(model, LayoutConfig(), halves, **pairs, mask_embedding_noise=0.0))
        assert parity.compare(quiet, alone)[0] > 100 * parity.GOAL
        masks = parity.measure(noisy(model, LayoutConfig(), halves, **pairs, editing=None))
        assert parity.compare(masks, alone)[0] > 100 * parity.GOAL
    for name in names:
        layout = (DENSE_LAYOUTS if model == "dense" else MOE_LAYOUTS)[name]
        error, where = parity.compare(alone, parity.measure(noisy(model, layout, halves, **pairs)))
        assert error <= parity.GOAL, (name, where)


@pytest.mark.parametrize(("model", "names"), [("dense", ["CP2", "PP2"]), ("softmax", ["TP2.SP.EP2"])])
def test_layout_of_the_joint_objective_equals_one_process(model, names):
    """Next tokens of the clean half beside the masks of the noisy one."""
    halves = (("objective", "joint"), ("block_size", parity.BLOCK_SIZE))
    for name in names:
        layout = (DENSE_LAYOUTS if model == "dense" else MOE_LAYOUTS)[name]
        run = parity_run(MODELS[model], layout, **dict(halves))
        error, where = parity.compare(one_process(model, halves), parity.measure(run))
        assert error <= parity.GOAL, (name, where)


RECOMPUTED = ["core_attn", "mlp", "moe", "moe_act", "shared_experts"]


@pytest.mark.parametrize(
    ("model", "modules"),
    [
        ("dense", ["core_attn", "mlp"]),
        ("sigmoid", ["moe"]),
        ("sigmoid", ["core_attn", "mlp", "moe_act", "shared_experts"]),
        ("blocks", ["moe", "core_attn"]),
    ],
    ids=str,
)
def test_parts_that_run_again_change_nothing(model, modules):
    run = parity_run(MODELS[model], LayoutConfig(), recompute="selective", recompute_modules=modules)
    error, where = parity.compare(one_process(model), parity.measure(run))
    assert error == 0, where


def test_parts_run_again_are_those_that_are_named():
    changed = {
        "": {},
        "core_attn": {"PatternAttention": 8},
        "mlp": {"MLP": 2},
        "moe": {"TopKRouter": 6, "PermutedExperts": 6, "SharedExpertMLP": 6},
        "shared_experts": {"SharedExpertMLP": 6},
        "moe_act": {},  # our own experts never keep their activations
    }
    (calls,) = run_ranks(calls_of_a_step, 1, list(changed))
    assert calls == {module: CALLS | more for module, more in changed.items()}


CALLS = {"PatternAttention": 4, "MLP": 1, "TopKRouter": 3, "PermutedExperts": 3, "SharedExpertMLP": 3}
"""Calls in the forward and backward pass of one batch through one dense and three MoE layers."""


def calls_of_a_step(modules: list[str]) -> dict[str, dict[str, int]]:
    """By the module that is run again; "" = none."""
    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.training import distributed_optimizer
    from llada_megatron.parallel.training.step import TrainingStep

    topology.initialize(LayoutConfig(), 0)
    found = {}
    for again in modules:
        choice = {"recompute": "selective", "recompute_modules": [again]} if again else {}
        run = parity_run(MODELS["sigmoid"], LayoutConfig(), micro_batch_size=8, **choice)
        models = build.wrap(run, build.build_run_chunks(run))
        calls = found[again] = dict.fromkeys(CALLS, 0)
        for module in models[0].modules():
            if (name := type(module).__name__) in CALLS:
                module.register_forward_pre_hook(lambda *_, n=name, calls=calls: calls.update({n: calls[n] + 1}))
        adam = distributed_optimizer.build_optimizer(run, models)
        TrainingStep(run, models, adam, parity.SyntheticData(run)).gradients(0)
    return found


def test_shared_experts_beside_the_messages_change_nothing():
    layout = dataclasses.replace(MOE_LAYOUTS["TP2.SP.EP2"], overlap_shared_experts=True)
    error, where = parity.compare(one_process("sigmoid"), parity.measure(parity_run(MODELS["sigmoid"], layout)))
    assert error <= parity.GOAL, where


@strategies.composite
def drawn_runs(draw) -> tuple[str, RunConfig, tuple[tuple[str, object], ...]]:
    """A valid run over two or four ranks, with everything drawn that must not matter."""
    model = draw(strategies.sampled_from(sorted(MODELS)))
    power = functools.partial(strategies.sampled_from)
    tensor = draw(power([1, 2]))
    sizes = {
        "tensor_parallel": tensor,
        "sequence_parallel": tensor > 1 and (MODELS[model].moe is not None or draw(strategies.booleans())),
        "pipeline_parallel": draw(power([1, 2])),
        "pipeline_chunks_per_rank": draw(power([1, 2])),
        "context_parallel": draw(power([1, 2])),
        "data_parallel": draw(power([1, 2])),
        "expert_parallel": draw(power([1, 2])) if MODELS[model].moe else 1,
        "expert_tensor_parallel": draw(power([1, 2])) if MODELS[model].moe else 1,
        "expert_dispatcher": draw(power(["alltoall", "allgather"])),
    }
    if sizes["pipeline_parallel"] == 2 and sizes["pipeline_chunks_per_rank"] == 1:
        sizes["pipeline_layers"] = draw(power([None, [1, 3], [3, 1]]))
    if MODELS[model].moe and MODELS[model].moe.shared_expert_ffn_hidden_size:
        sizes["overlap_shared_experts"] = draw(strategies.booleans())
    sizes["overlap_grad_reduce"] = draw(strategies.booleans())
    layout = LayoutConfig(**sizes)
    hypothesis.assume(layout.world_size in (2, 4))
    recompute = draw(power(["none", "full", "selective"]))
    modules = draw(strategies.lists(power(RECOMPUTED), min_size=1, max_size=3)) if recompute == "selective" else []
    block = draw(power([None, 1, parity.BLOCK_SIZE, 8]))
    doubled = block in (1, 8) and draw(strategies.booleans())
    changes = (
        ("objective", "block_diffusion" if doubled else "diffusion"),
        ("seed", draw(strategies.integers(0, 3))),
        ("recompute", recompute),
        ("recompute_modules", modules),
        ("block_size", block),
        ("replace_ratio", 0.0 if doubled else draw(power([0.0, 0.3]))),
    )
    run = parity_run(MODELS[model], layout, **dict(changes))
    normalization = draw(power(["all_tokens", "masked_tokens"]))
    run = dataclasses.replace(run, objective=dataclasses.replace(run.objective, normalization=normalization))
    try:
        validate_run(run)
    except ConfigError:
        hypothesis.reject()
    return model, run, changes


@hypothesis.settings(max_examples=6)
@hypothesis.given(drawn_runs())
def test_drawn_layout_equals_one_process(drawn):
    _, run, _ = drawn
    whole = dataclasses.replace(run.training, recompute="none", recompute_modules=[])
    reference = parity.measure(dataclasses.replace(run, layout=LayoutConfig(), training=whole))
    error, where = parity.compare(reference, parity.measure(run))
    assert error <= parity.GOAL, (where, run.layout, run.objective.normalization)


@pytest.mark.parametrize("changes", [{"micro_batch_size": 4}, {"logits_chunk_mb": 0}], ids=str)
def test_accumulation_and_chunked_logits_change_nothing(changes):
    error, where = parity.compare(
        one_process("dense"), parity.measure(parity_run(MODELS["dense"], LayoutConfig(), **changes))
    )
    assert error <= parity.GOAL, where


@pytest.mark.parametrize("name", ["TP2.SP", "TP2.SP.EP2", "TP2.SP.ETP2", "EP2", "EP2.ETP2", "TP2.SP.PP2.EP2"])
@pytest.mark.parametrize("model", ["softmax", "sigmoid"])
def test_norm_of_unit_gradients_counts_every_parameter(model, name):
    from llada_megatron.llada_moe.model.parameters import count_parameters

    run = parity_run(MODELS[model], MOE_LAYOUTS[name])
    norms = run_ranks(unit_gradient_norm, run.layout.world_size, run)
    trainable = count_parameters(run.model).trainable
    assert norms == pytest.approx([math.sqrt(trainable)] * len(norms), rel=1e-6)


@pytest.mark.parametrize("name", ["TP2.SP", "TP2.SP.PP2", "PP2.DP2"])
def test_norm_of_unit_gradients_of_a_dense_model(name):
    from llada_megatron.llada_moe.model.parameters import count_parameters

    run = parity_run(MODELS["dense"], DENSE_LAYOUTS[name])
    norms = run_ranks(unit_gradient_norm, run.layout.world_size, run)
    assert norms == pytest.approx([math.sqrt(count_parameters(run.model).trainable)] * len(norms), rel=1e-6)


def unit_gradient_norm(run: RunConfig) -> float:
    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.training import distributed_optimizer

    topology.initialize(run.layout, run.training.seed)
    models = build.wrap(run, build.build_run_chunks(run))
    adam = distributed_optimizer.build_optimizer(run, models)
    for model in models:
        for parameter in model.parameters():
            parameter.main_grad.fill_(1.0)
    adam.prepare_grads()
    return float(adam.get_grad_norm())


def test_norm_is_measured_where_nothing_is_clipped():
    run = parity_run(MODELS["dense"], LayoutConfig())
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, clip_grad_norm=0.0))
    assert run_ranks(first_norm, 1, run)[0] == pytest.approx(one_process("dense").grad_norm, rel=1e-6)


def first_norm(run: RunConfig) -> float:
    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.training import distributed_optimizer
    from llada_megatron.parallel.training.step import TrainingStep

    topology.initialize(run.layout, run.training.seed)
    models = build.wrap(run, build.build_run_chunks(run))
    return TrainingStep(run, models, distributed_optimizer.build_optimizer(run, models), parity.SyntheticData(run))(
        0
    ).grad_norm


def test_bfloat16_keeps_fp32_main_weights():
    run = parity_run(MODELS["dense"], DENSE_LAYOUTS["DP2"], precision="bf16")
    losses = run_ranks(three_losses, 2, run)
    reference = run_ranks(three_losses, 1, parity_run(MODELS["dense"], LayoutConfig()))
    assert losses[0] == pytest.approx(reference[0], rel=0.01)
    assert losses[0][2] < losses[0][0]


def three_losses(run: RunConfig) -> list[float]:
    """Losses of three steps over the same samples."""
    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.training import distributed_optimizer
    from llada_megatron.parallel.training.step import TrainingStep

    topology.initialize(run.layout, run.training.seed)
    models = build.wrap(run, build.build_run_chunks(run))
    adam = distributed_optimizer.build_optimizer(run, models)
    step = TrainingStep(run, models, adam, parity.SyntheticData(run))
    losses = []
    for _ in range(3):
        loss = step(0).losses.loss
        torch.distributed.all_reduce(loss)
        losses.append(float(loss) / run.layout.tensor_parallel)
    if run.training.precision == "bf16":
        inner = getattr(adam, "chained_optimizers", [adam])[0].optimizer
        assert inner.param_groups[0]["params"][0].dtype is torch.float32
        assert next(models[0].parameters()).dtype is torch.bfloat16
    return losses


@pytest.mark.parametrize("side", ["reference", "other"])
@pytest.mark.parametrize("where", ["a", "b", "loss", "gradient norm"])
def test_a_comparison_that_meets_nan_fails(side, where):
    def gradients(spoilt):
        tensors = {name: torch.ones(4) for name in ("a", "b")}
        if spoilt in tensors:
            tensors[spoilt][2:] = math.nan
        return parity.Gradients(
            math.nan if spoilt == "loss" else 1.0, math.nan if spoilt == "gradient norm" else 2.0, tensors
        )

    good, bad = gradients(None), gradients(where)
    found = parity.compare(bad, good) if side == "reference" else parity.compare(good, bad)
    assert found == (math.inf, where)
    assert parity.compare(good, good)[0] == 0
