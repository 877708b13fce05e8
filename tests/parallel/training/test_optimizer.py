"""The optimizer has the configured numbers, and decays matrices only."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.tools.bench import parity
from llada_megatron.tools.bench.layouts import DENSE_LAYOUTS, MODELS, MOE_LAYOUTS, parity_run
from tests.ranks import run_ranks

RATE, DECAY = 0.5, 0.25
SETTINGS = OptimizerConfig(
    learning_rate=LearningRateConfig(peak=RATE), beta1=0.7, beta2=0.8, epsilon=1e-3, weight_decay=DECAY
)


def with_settings(model: str, layout: LayoutConfig, settings: OptimizerConfig = SETTINGS, **changes) -> RunConfig:
    return dataclasses.replace(parity_run(MODELS[model], layout, **changes), optimizer=settings)


def built(run: RunConfig):
    """The chunks of this rank, their wrappers and the optimizer."""
    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.training import distributed_optimizer

    topology.initialize(run.layout, run.training.seed)
    chunks = build.build_run_chunks(run)
    models = build.wrap(run, chunks)
    return chunks, models, distributed_optimizer.build_optimizer(run, models)


def numbers_and_decays(run: RunConfig):
    """What the groups of the optimizer say, and by what each parameter is multiplied in an update without gradients."""
    from llada_megatron.parallel.training import distributed_optimizer

    chunks, models, optimizer = built(run)
    distributed_optimizer.set_learning_rate(run, optimizer, 0)
    keys = ("lr", "betas", "eps")
    numbers = {tuple(group[key] for key in keys) for part in distributed_optimizer._parts(optimizer)
               for group in part.optimizer.param_groups}  # fmt: skip
    parameters = {name: parameter for chunk in chunks for name, parameter in chunk.named_parameters()}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(1.0)
    optimizer.reload_model_params()
    for model in models:
        model.zero_grad_buffer()
    optimizer.prepare_grads()
    optimizer.step_with_ready_grads()
    return numbers, {name: (parameter.dim(), float(parameter.mean())) for name, parameter in parameters.items()}


@pytest.mark.parametrize(
    ("model", "layout", "precision"),
    [
        ("sigmoid", LayoutConfig(), "fp32"),
        ("softmax", MOE_LAYOUTS["EP2"], "fp32"),
        ("dense", DENSE_LAYOUTS["DP2"], "bf16"),
    ],
)
def test_numbers_are_those_of_the_run_and_only_matrices_decay(model, layout, precision):
    run = with_settings(model, layout, precision=precision)
    for numbers, decayed in run_ranks(numbers_and_decays, layout.world_size, run):
        assert numbers == {(RATE, (0.7, 0.8), 1e-3)}
        assert {dimensions for dimensions, _ in decayed.values()} == {1, 2}
        expected = {name: 1.0 - RATE * DECAY if dimensions > 1 else 1.0 for name, (dimensions, _) in decayed.items()}
        assert {name: value for name, (_, value) in decayed.items()} == expected
        assert any("q_layernorm" in name for name in decayed) == (model != "dense")


def updated(run: RunConfig):
    """(name, whole shape, offset, values) of this rank's weights after two steps."""
    from llada_megatron.parallel.training import distributed_optimizer
    from llada_megatron.parallel.training.step import TrainingStep

    chunks, models, optimizer = built(run)
    step = TrainingStep(run, models, optimizer, parity.SyntheticData(run))
    for number in range(2):
        distributed_optimizer.set_learning_rate(run, optimizer, number)
        step(number)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.main_grad = parameter.data  # `gradient_parts` names and places what stands here
    return parity.gradient_parts(chunks)


def weights(run: RunConfig) -> parity.Gradients:
    parts = run_ranks(updated, run.layout.world_size, run)
    return parity.Gradients(1.0, 1.0, parity.join_parts(part for rank in parts for part in rank))


# a large epsilon: with a small one the update of a gradient near zero is a whole step, of a sign that is noise
SMOOTH = OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-2), epsilon=1e-2)


@functools.cache
def weights_of_one_process(model: str) -> parity.Gradients:
    return weights(with_settings(model, LayoutConfig(), SMOOTH))


@pytest.mark.parametrize(("model", "name"), [("dense", "DP2"), ("dense", "TP2.SP"), ("softmax", "EP2")])
def test_weights_after_updates_are_those_of_one_process(model, name):
    layout = (DENSE_LAYOUTS if model == "dense" else MOE_LAYOUTS)[name]
    found = weights(with_settings(model, layout, SMOOTH))
    error, where = parity.compare(weights_of_one_process(model), found)
    assert error <= parity.GOAL, where


def add_load(load: torch.Tensor, router: torch.nn.Module, arguments: object, output: tuple[torch.Tensor, ...]) -> None:
    """Count how many tokens a pass sends to each expert."""
    load.add_(output[1].sum(0))


def biases_and_loads(run: RunConfig):
    """Of each router: its expert bias before and after a step, and how many tokens each expert got in it."""
    from megatron.core.transformer.moe.router import TopKRouter

    from llada_megatron.parallel.training.step import TrainingStep

    chunks, models, optimizer = built(run)
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)]
    loads = [torch.zeros(run.model.moe.num_experts) for _ in routers]
    for router, load in zip(routers, loads, strict=True):
        router.register_forward_hook(functools.partial(add_load, load))
    before = [router.expert_bias.clone() for router in routers]
    TrainingStep(run, models, optimizer, parity.SyntheticData(run))(0)
    return [(a, router.expert_bias.clone(), load) for a, router, load in zip(before, routers, loads, strict=True)]


@pytest.mark.parametrize("model", ["sigmoid", "blocks"])
def test_the_bias_of_a_full_expert_falls_and_that_of_an_empty_one_rises(model):
    found = run_ranks(biases_and_loads, 1, with_settings(model, LayoutConfig()))[0]
    rate = MODELS[model].moe.expert_bias_update_rate
    assert found and rate > 0
    for before, after, load in found:
        assert load.max() > load.mean() > load.min()
        torch.testing.assert_close(after - before, rate * torch.sign(load.mean() - load))


def test_transformer_engines_adam_is_filled_as_it_asks_for():
    """Its `initialize_state` takes two arguments, as in 2.20.2; Megatron's call of it gives one."""
    from llada_megatron.parallel.training import distributed_optimizer

    class Adam:
        store_param_remainders = False
        param_groups: ClassVar = [{"params": ["first", "second"]}]
        state: ClassVar = {"first": {"exp_avg": 0}, "second": {}}

        def initialize_state(self, param, store_param_remainders):
            self.state[param] = {"remainders": store_param_remainders}

    def init_state_fn(adam, config):
        raise TypeError("initialize_state() missing 1 required positional argument")

    config = SimpleNamespace(use_precision_aware_optimizer=True)
    part = SimpleNamespace(optimizer=Adam(), config=config, init_state_fn=init_state_fn)
    distributed_optimizer._fill_fresh_adam(part, loading=False)
    assert part.optimizer.state == {"first": {"exp_avg": 0}, "second": {"remainders": False}}
