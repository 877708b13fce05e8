"""Runs of the tiny models for tests, and the weights that all their layouts start from."""

import functools

import torch

from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.tools.bench.layouts import parity_run
from tests.ranks import run_ranks

LAYOUTS = {
    "one": LayoutConfig(),
    "TP2": LayoutConfig(tensor_parallel=2, sequence_parallel=True),
    "PP2": LayoutConfig(pipeline_parallel=2),
    "EP2": LayoutConfig(data_parallel=2, expert_parallel=2),
    "ETP2": LayoutConfig(data_parallel=2, expert_tensor_parallel=2),
    "TP2.PP2": LayoutConfig(tensor_parallel=2, sequence_parallel=True, pipeline_parallel=2),
}


def run_of(model, layout):
    """A run of `configs/models/{model}.yaml` under one of LAYOUTS."""
    return parity_run(load_model(model), LAYOUTS[layout])


def chunks_of(run):
    """This rank's chunks with their initial weights, process groups included."""
    from llada_megatron.parallel import build, topology

    topology.initialize(run.layout, run.training.seed)
    return build.build_run_chunks(run)


def _weights(run):
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    from llada_megatron.parallel import sharded_state

    weights = {}
    for entry in nested_values(sharded_state.apply_factories_copy(chunks_of(run)[0])):
        whole = weights.setdefault(entry.key, torch.full(entry.global_shape, torch.nan, dtype=entry.dtype))
        data = entry.data.detach().view((1,) * entry.prepend_axis_num + tuple(entry.data.shape))
        whole[tuple(slice(a, a + n) for a, n in zip(entry.global_offset, data.shape, strict=True))] = data
    return weights


@functools.cache
def weights(model):
    """The whole initial weights of a tiny model, by their sharded keys."""
    return run_ranks(_weights, 1, run_of(model, "one"))[0]
