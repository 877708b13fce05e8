"""Parameters counted in real models on the meta device, against what the planner has from the sizes."""

from dataclasses import replace

import pytest

from llada_megatron.llada_moe.config import load_model, load_run
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.model.parameters import count_parameters
from llada_megatron.llada_moe.planning.held_parameters import stage_parameters
from llada_megatron.llada_moe.planning.workload import Workload, stack_of

TENSOR = {"tensor_parallel": 2, "sequence_parallel": True}
PIPELINE = {"pipeline_parallel": 2}
DENSE = [
    {},
    {"tensor_parallel": 2},
    TENSOR,
    PIPELINE,
    {**TENSOR, **PIPELINE},
    {**PIPELINE, "pipeline_chunks_per_rank": 2},
    {**PIPELINE, "pipeline_layers": [3, 1]},
    {"context_parallel": 2},
    {"data_parallel": 4},
]
EXPERTS = [
    {"data_parallel": 2, "expert_parallel": 2},
    {"data_parallel": 4, "expert_parallel": 4},
    {"context_parallel": 2, "expert_parallel": 2},
    {**PIPELINE, "data_parallel": 2, "expert_parallel": 2},
    {**TENSOR, "data_parallel": 2, "expert_parallel": 2},
    {**TENSOR, **PIPELINE, "expert_parallel": 2},
    {"data_parallel": 2, "expert_tensor_parallel": 2},
]
SMALL = {
    "tiny-dense": DENSE,
    "tiny-moe": [*DENSE, *EXPERTS],
    "tiny-moe-softmax": EXPERTS,
}
PUBLISHED = {
    "llada-8b": {**TENSOR, **PIPELINE},
    "llada-moe-7b-a1b": {"data_parallel": 64, "expert_parallel": 64},
    "llada2-mini": {"data_parallel": 256, "expert_parallel": 256},
    "llada2-flash": {"data_parallel": 256, "expert_parallel": 256},
}
"""All experts apart, so that few are built."""
RUN = load_run("llada-8b-pretrain")


def counted_and_planned(name, keys):
    from llada_megatron.parallel.meta_ranks import count_stages

    model, layout = load_model(name), LayoutConfig(**keys)
    made = Workload(
        stack=stack_of(replace(RUN, model=model)), layout=layout, sequence=64, micro_batch=1, micro_batches=1
    )
    planned = [stage_parameters(made, stage) for stage in range(layout.pipeline_parallel)]
    return count_stages(model, layout), planned


@pytest.mark.parametrize("name", SMALL)
def test_the_sizes_give_what_the_model_holds_under_every_layout(name):
    for keys in SMALL[name]:
        counted, planned = counted_and_planned(name, keys)
        assert counted == planned, keys


@pytest.mark.parametrize("name", PUBLISHED)
def test_ranks_of_a_published_model_hold_its_number_together(name):
    """`count_parameters` is held against the published numbers by tests/llada_moe/model/test_parameters.py."""
    counted, planned = counted_and_planned(name, PUBLISHED[name])
    assert counted == planned
    layout, whole = LayoutConfig(**PUBLISHED[name]), count_parameters(load_model(name))
    norms = whole.parts["norms"] + whole.parts["final_norm"]
    cut = sum(held.dense for held in counted) * layout.tensor_parallel - (layout.tensor_parallel - 1) * norms
    assert cut + sum(held.experts for held in counted) * layout.expert_parallel == whole.trainable
