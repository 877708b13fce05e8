"""The process groups of a layout, and where this rank stands in them."""

from __future__ import annotations

import datetime
import gc
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakSet

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.errors import ConfigError, ResourceError
from llada_megatron.parallel import device, host_group, machine
from llada_megatron.parallel.coordinates import RankCoordinates
from llada_megatron.parallel.host_group import TIME_LIMIT_S

_WRAPPED: WeakSet[torch.nn.Module] = WeakSet()


def join(rank: int, world_size: int, init_method: str = "env://", timeout_s: float = TIME_LIMIT_S) -> None:
    """Join the world process group: NCCL on this process's GPU, or gloo.

    Raises:
        ResourceError: the machine has no GPU for this rank, or one that its driver keeps torch from.
    """
    machine.prepare()
    fault = machine.driver_fault()
    if fault:
        raise ResourceError(f"rank {rank} on {platform.node()}: {fault}")
    cuda = device.cuda_available()
    if cuda:
        _take_gpu(rank)
    torch.distributed.init_process_group(
        device.communication_backend(),
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    if cuda:
        # A network that does not work fails here and not inside the first step. The argument `device_id` of
        # init_process_group does this as well, but then every later group is split off the world's communicator, also
        # by ranks outside of it: a gloo group of some ranks hangs (pytorch#153960), and Megatron makes 2,179 groups at
        # 512 ranks, of which a rank uses a dozen.
        torch.distributed.all_reduce(torch.zeros(1, device=device.current()))
        torch.cuda.synchronize()


def _take_gpu(rank: int) -> None:
    number = own_gpu(rank, torch.cuda.device_count())
    torch.cuda.set_device(number)
    machine.bind_to_gpu(str(torch.cuda.get_device_properties(number).uuid))


def own_gpu(rank: int, gpus: int) -> int:
    """The number of this rank's GPU among the `gpus` that it can see.

    Raises:
        ResourceError: there are fewer GPUs than ranks on this machine.
    """
    if "LOCAL_RANK" not in os.environ:
        return rank % gpus
    local = int(os.environ["LOCAL_RANK"])
    if local >= gpus:
        raise ResourceError(
            f"rank {rank} is number {local + 1} on {platform.node()}, which has {gpus} "
            f"{'GPU' if gpus == 1 else 'GPUs'} for its processes, one for each: start fewer ranks there, and let each "
            "of them see all GPUs of its machine (CUDA_VISIBLE_DEVICES)"
        )
    return local


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
    make_groups(layout)
    host_group.data_parallel()
    model_parallel_cuda_manual_seed(seed)


def make_groups(layout: LayoutConfig) -> None:
    """Megatron's groups of ranks; nothing else of a rank is set up (collective)."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.pipeline_chunks_per_rank
        if layout.pipeline_chunks_per_rank > 1
        else None,
        context_parallel_size=layout.context_parallel,
        expert_model_parallel_size=layout.expert_parallel,
        expert_tensor_parallel_size=layout.expert_tensor_parallel,
        create_gloo_process_groups=False,  # tensors on the host are reduced by host_group
    )


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


def release_at_leave(models: Sequence[torch.nn.Module]) -> None:
    """Take models apart that are wrapped for training when this process leaves its groups.

    Megatron's hooks on the parameters know the model, and the parameters' nodes of the autograd graph know the hooks.
    Python's collector does not see these, so that models, optimizers and groups, with three threads each, would stay.
    """
    _WRAPPED.update(models)


@contextmanager
def world_of_one(seed: int = 0) -> Iterator[str]:
    """Groups of this process alone, for as long as the block lasts; yields a temporary directory, removed with them."""
    with tempfile.TemporaryDirectory(prefix="llada-") as scratch:
        join(0, 1, f"file://{scratch}/rendezvous")
        try:
            initialize(LayoutConfig(), seed)
            yield scratch
        finally:
            leave()


def leave() -> None:
    """Release every process group, and the models that ran on them.

    What refers to itself is collected at once: each group has threads that wake a hundred times a second.
    """
    for model in list(_WRAPPED):
        vars(model).clear()
    _WRAPPED.clear()
    parallel_state.destroy_model_parallel()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()
