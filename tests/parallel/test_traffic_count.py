"""Bytes that a training step sends along each axis, counted at the dispatcher, against what the planner predicts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.planning.held_parameters import stage_parameters
from llada_megatron.llada_moe.planning.traffic import (
    context_bytes,
    data_bytes,
    exchange_bytes,
    pipeline_bytes,
    tensor_bytes,
)
from llada_megatron.llada_moe.planning.workload import of_run
from llada_megatron.tools.bench.layouts import DENSE, SOFTMAX, parity_run
from llada_megatron.tools.bench.parity import SyntheticData
from tests.ranks import run_ranks

MICROBATCHES = 4
EVERY_EXPERT = replace(SOFTMAX, moe=replace(SOFTMAX.moe, top_k=8))
"""Every token visits every expert, so that what is exchanged does not depend on the router."""

LAYOUTS = {
    "TP2": (DENSE, {"tensor_parallel": 2}),
    "TP2.SP": (DENSE, {"tensor_parallel": 2, "sequence_parallel": True}),
    "PP2": (DENSE, {"pipeline_parallel": 2}),
    "PP2 interleaved": (DENSE, {"pipeline_parallel": 2, "pipeline_chunks_per_rank": 2}),
    "CP2": (DENSE, {"context_parallel": 2}),
    "DP2": (DENSE, {"data_parallel": 2}),
    "EP2": (EVERY_EXPERT, {"data_parallel": 2, "expert_parallel": 2}),
}
AXIS = {"TP2": "tensor", "PP2": "pipeline", "CP2": "context", "DP2": "data", "EP2": "expert"}


def every_traffic():
    """On one rank: what it sends in the second step of each layout, one layout after the other."""
    return {name: step_traffic(model, LayoutConfig(**keys)) for name, (model, keys) in LAYOUTS.items()}


def step_traffic(model, layout):
    """On one rank, the second step: bytes by axis."""
    import torch
    from megatron.core import parallel_state

    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.traffic_count import TrafficCount
    from llada_megatron.parallel.training import distributed_optimizer
    from llada_megatron.parallel.training.step import TrainingStep

    run = the_run(model, layout)
    topology.initialize(run.layout, run.training.seed)
    models = build.wrap(run, build.build_run_chunks(run))
    step = TrainingStep(run, models, distributed_optimizer.build_optimizer(run, models), SyntheticData(run))
    step(0)
    groups = {
        "tensor": parallel_state.get_tensor_model_parallel_group(),
        "pipeline": parallel_state.get_pipeline_model_parallel_group(),
        "context": parallel_state.get_context_parallel_group(),
        "expert": parallel_state.get_expert_model_parallel_group(),
        "data": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
    with TrafficCount() as counted:
        step(1)
    sent = {axis: counted.sent[group.group_name] for axis, group in groups.items() if group.size() > 1}
    if layout.pipeline_chunks_per_rank > 1:  # messages that are not batched go through the world's group
        sent["pipeline"] += counted.sent[torch.distributed.group.WORLD.group_name]
    parallel_state.destroy_model_parallel()
    return sent


def the_run(model, layout):
    size = layout.data_parallel * MICROBATCHES
    return parity_run(model, layout, global_batch_size=size, micro_batch_size=1)


def planned(model, layout):
    """The planner's workload, with the rows that the masks of the second step supervise."""
    from llada_megatron.llada_moe.model.head import Targets

    run = the_run(model, layout)
    batch = SyntheticData(run).batch(range(MICROBATCHES, 2 * MICROBATCHES))
    shards = layout.tensor_parallel if layout.sequence_parallel else 1
    rows = [
        Targets.of(batch.labels[i : i + 1], batch.weights[i : i + 1], 0, shards).labels.numel()
        for i in range(MICROBATCHES)
    ]
    return replace(of_run(run), supervised_mean=sum(rows) / MICROBATCHES / run.training.sequence_length)


@pytest.fixture(scope="module")
def sent():
    return run_ranks(every_traffic, 2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_predicted_is_what_is_sent(name, sent):
    model, keys = LAYOUTS[name]
    layout = LayoutConfig(**keys)
    made, axis = planned(model, layout), AXIS[name.split(".")[0].split(" ")[0]]
    for rank, counted in enumerate(each[name] for each in sent):
        stage = rank if layout.pipeline_parallel > 1 else 0
        held = [stage_parameters(made, stage)]
        predicted = {
            "tensor": tensor_bytes(made, stage),
            "pipeline": pipeline_bytes(made, stage),
            "context": context_bytes(made, stage),
            "expert": exchange_bytes(made, stage),
            "data": data_bytes(made, held[0].dense, made.dense_copies),
        }
        assert counted[axis] == predicted[axis], (rank, axis)
