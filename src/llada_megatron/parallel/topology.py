"""The process groups of a layout, and where this rank stands in them."""

from __future__ import annotations

import datetime
import os

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.parallel import device
from llada_megatron.parallel.coordinates import RankCoordinates

TIME_LIMIT_S = 600.0
"""A collective that takes longer fails: a rank is gone or hangs."""


def join(rank: int, world_size: int, init_method: str = "env://", timeout_s: float = TIME_LIMIT_S) -> None:
    """Join the world process group: NCCL on this process's GPU, or gloo."""
    if device.cuda_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count())))
    torch.distributed.init_process_group(
        device.communication_backend(),
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )


def initialize(layout: LayoutConfig, seed: int) -> None:
    """Make the groups of `layout` over the world group, and seed the weights' initialisation.

    Raises:
        ConfigError: the world has another number of ranks than the layout.
    """
    world = torch.distributed.get_world_size()
    if world != layout.world_size:
        raise ConfigError(
            f"the layout needs {layout.world_size} ranks (tensor {layout.tensor_parallel} x "
            f"pipeline {layout.pipeline_parallel} x context {layout.context_parallel} x "
            f"data {layout.data_parallel}), but {world} joined; "
            f"set layout.data_parallel or start {layout.world_size} processes"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.pipeline_chunks_per_rank
        if layout.pipeline_chunks_per_rank > 1
        else None,
        context_parallel_size=layout.context_parallel,
        expert_model_parallel_size=layout.expert_parallel,
        expert_tensor_parallel_size=layout.expert_tensor_parallel,
        create_gloo_process_groups=True,
    )
    model_parallel_cuda_manual_seed(seed)


def coordinates() -> RankCoordinates:
    """This rank's place in the initialised layout."""
    return RankCoordinates(
        rank=torch.distributed.get_rank(),
        data=parallel_state.get_data_parallel_rank(),
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        context=parallel_state.get_context_parallel_rank(),
        expert=parallel_state.get_expert_model_parallel_rank(),
    )


def leave() -> None:
    """Release every process group."""
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
