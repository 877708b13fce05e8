"""Parameters of the ranks of a layout, counted in the model that they would build, without weights and without ranks.

Ranks differ by their pipeline stage only: those of one stage hold other tensor shards, experts and data, of the same
shapes. Of each stage one rank is built, on the meta device, in process groups that know their sizes and send nothing.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace

import torch

from llada_megatron.parallel import device

device.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402

from llada_megatron.llada_moe.config.layout import LayoutConfig  # noqa: E402
from llada_megatron.llada_moe.config.model import ModelConfig  # noqa: E402
from llada_megatron.llada_moe.model.patterns import FULL  # noqa: E402
from llada_megatron.llada_moe.planning.held_parameters import Held  # noqa: E402
from llada_megatron.parallel.build import build_chunks, transformer_config  # noqa: E402
from llada_megatron.parallel.topology import make_groups  # noqa: E402


@contextlib.contextmanager
def as_rank(layout: LayoutConfig, rank: int) -> Iterator[None]:
    """Inside, this process is one rank of a layout whose other ranks do not exist."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        make_groups(layout)
        model_parallel_cuda_manual_seed(0)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def count_stages(model: ModelConfig, layout: LayoutConfig) -> list[Held]:
    """What a rank of each pipeline stage holds, in the order of the stages."""
    # the kernels of a dispatcher change no weight, and need not be there
    layout = replace(layout, expert_dispatcher="alltoall", overlap_grad_reduce=False, overlap_param_gather=False)
    return [count_stage(model, layout, stage) for stage in range(layout.pipeline_parallel)]


def count_stage(model: ModelConfig, layout: LayoutConfig, stage: int) -> Held:
    """What the first rank of a pipeline stage holds."""
    rank = stage * (layout.world_size // layout.pipeline_parallel)
    with as_rank(layout, rank), device.on_meta(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron announces coming changes of its own insides
        chunks = build_chunks(model, layout, transformer_config(model, layout), FULL)
        counts = [(name, value.numel()) for chunk in chunks for name, value in chunk.named_parameters()]
    experts = sum(count for name, count in counts if ".mlp.experts." in name)
    return Held(sum(count for _, count in counts) - experts, experts)
