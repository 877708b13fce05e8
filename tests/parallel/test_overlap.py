"""Overlapped reductions and gathers change no number: losses, gradient norms, validation and weights are those without,
but for the order in which the norm's squares are added."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.tools.bench.layouts import MODELS, parity_run
from tests.ranks import run_ranks

STEPS = 3
"""Megatron reduces as before in the first step, and overlaps from the second."""
BUCKET = 6000
"""Weights in a bucket: few enough that a toy model has several."""

CASES = {
    "DP2": ("sigmoid", LayoutConfig(data_parallel=2)),
    "EP2": ("sigmoid", LayoutConfig(data_parallel=2, expert_parallel=2)),
    "PP2.DP2 interleaved": ("tied", LayoutConfig(pipeline_parallel=2, pipeline_chunks_per_rank=2, data_parallel=2)),
}


def spread(name: str, overlap: bool, **training: object) -> RunConfig:
    model, layout = CASES[name]
    layout = dataclasses.replace(layout, overlap_grad_reduce=overlap, overlap_param_gather=overlap)
    return parity_run(MODELS[model], layout, **training)


def course(run: RunConfig) -> tuple[list[float], list[torch.Tensor], int, int]:
    """Losses, gradient norms and a validation; the weights that a checkpoint would hold; the number of buckets, and of
    the modules that wait for their weights before they run."""
    from llada_megatron.llada_moe.objectives import make_objective
    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.training.distributed_optimizer import build_optimizer, set_learning_rate
    from llada_megatron.parallel.training.state import RunState
    from llada_megatron.parallel.training.step import TrainingStep
    from llada_megatron.parallel.training.validation import validate
    from llada_megatron.tools.bench.parity import SyntheticData

    build.DistributedDataParallelConfig = functools.partial(build.DistributedDataParallelConfig, bucket_size=BUCKET)
    topology.initialize(run.layout, run.training.seed)
    chunks = build.build_run_chunks(run)
    models = build.wrap(run, chunks)
    step = TrainingStep(run, models, build_optimizer(run, models), SyntheticData(run))
    figures = []
    for number in range(STEPS):
        set_learning_rate(run, step.optimizer, number)
        result = step(number)
        figures += [float(result.losses.loss), result.grad_norm]
        if number == 1:
            held_out = validate(run, make_objective(run.objective), models, SyntheticData(run), number)
            figures.append(held_out.nats)
    RunState._metadata = lambda self: {}
    RunState(run, step.objective, chunks, step.optimizer, []).save(SimpleNamespace(save=lambda *_: None))
    buckets = sum(len(group.buckets) for model in models for group in model.bucket_groups)
    weights = [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
    return figures, weights, buckets, sum(len(model.remove_forward_pre_hook_handles) for model in models)


@pytest.mark.parametrize("name", CASES)
def test_overlap_changes_no_number(name):
    plain = run_ranks(course, CASES[name][1].world_size, spread(name, overlap=False))
    overlapped = run_ranks(course, CASES[name][1].world_size, spread(name, overlap=True))
    assert overlapped[0][2] > 1  # the first stage has several buckets
    assert all(waiting > 0 for *_, waiting in overlapped) and not any(waiting for *_, waiting in plain)
    for (figures, weights, *_), (expected_figures, expected_weights, *_) in zip(overlapped, plain, strict=True):
        assert figures == pytest.approx(expected_figures, rel=1e-6)
        for mine, expected in zip(weights, expected_weights, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-4)  # an update is 1e-2
