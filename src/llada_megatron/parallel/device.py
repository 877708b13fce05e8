"""The device a process computes on, and everything Megatron-Core needs in order to run without CUDA.

`install()` must run before the first import of `megatron.core`. It hides the optional libraries that this machine
cannot use (`llada_moe.model.accelerations`). With CUDA it changes nothing else but two named patches and keeps torch
from taking cuDNN for attention. Without CUDA it gives the *name* `torch` inside the modules of megatron.core a stand-in
whose CUDA calls answer for the CPU; torch itself stays as it is, except for two methods of Tensor while five named
methods of Megatron run. File and line references are those of megatron-core 0.16.1; the same answers hold for 0.19.2.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from llada_megatron.llada_moe.model import accelerations
from llada_megatron.parallel import torch_adam

MEGATRON_MODULES = (
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.async_utils",
    "megatron.core.dist_checkpointing.strategies.common",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.distributed",
    "megatron.core.models.common.embeddings.rotary_pos_embedding",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.transformer.moe.moe_layer",
    "megatron.core.transformer.moe.moe_utils",
    "megatron.core.transformer.moe.shared_experts",
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.transformer.multi_token_prediction",
)
"""Modules that must be loaded when the stand-in is placed: one imported later would still see the real torch."""

_device = "cpu"
_installed = False


def cuda_available() -> bool:
    """Whether this process computes on CUDA."""
    return torch.cuda.is_available()


def current() -> torch.device:
    """The device of this process's tensors ("meta" inside `on_meta`)."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if cuda_available() and _device == "cpu"
        else torch.device(_device)
    )


def use(where: torch.device) -> None:
    """Make `where` the device of the calling thread: a new thread begins with the first GPU of the machine."""
    if where.type == "cuda":
        torch.cuda.set_device(where)


def communication_backend() -> str:
    """Backend of torch.distributed: NCCL with CUDA, else gloo.

    Every group inherits it. Gloo beside NCCL would connect all ranks of each of them, for tensors on the host that have
    groups of their own (`host_group`).
    """
    return "nccl" if cuda_available() else "gloo"


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Build modules without storage: shapes and parameter counts only."""
    global _device
    previous, _device = _device, "meta"
    try:
        with torch.device("meta"):
            yield
    finally:
        _device = previous


def install() -> None:
    """Make megatron.core importable and usable on this machine. Idempotent.

    Raises:
        RuntimeError: a module of megatron.core was imported before.
    """
    global _installed
    if _installed:
        return
    if _megatron_imported():
        raise RuntimeError("llada_megatron.parallel.device.install() must run before the first import of megatron.core")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron asks for it when tensor parallelism overlaps
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accelerations.settle(cuda_available())
        if cuda_available():
            # cuDNN builds a plan for each length of a document: a second on the host (modelscope/FunASR issue 3704)
            torch.backends.cuda.enable_cudnn_sdp(False)
            for name in MEGATRON_MODULES:  # some warn as they are imported, that Apex is not installed
                importlib.import_module(name)
        else:
            # a login node with a CUDA toolkit would read that no CUDA runtime is found, of which `llada env` tells
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
            _import_without_compiling()
            _place_stand_in(_torch_stand_in())
            _patch_functions()
            _patch_cuda_type_names()
        _patch_missing_gemm()
    torch_adam.patch_resume()
    _installed = True


def _megatron_imported() -> bool:
    return any(name.startswith("megatron.core") for name in sys.modules)


# --- the stand-in for torch ------------------------------------------------------------------------------------------


class _Overlay(types.ModuleType):
    """A module with some names replaced; every other name is looked up in the real one."""

    def __init__(self, real: types.ModuleType, **replaced: Any) -> None:
        super().__init__(real.__name__)
        self.__dict__.update(replaced)
        self.__dict__["_real"] = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_real"], name)


class _Nothing:
    """A CUDA stream, event or call that does nothing; equal to its like (token_dispatcher.py:871 compares streams)."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> _Nothing:
        return self

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: Any) -> bool:
        return False

    def __getattr__(self, _name: str) -> _Nothing:
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Nothing)

    def __hash__(self) -> int:
        return 0


def _here(device: Any) -> Any:
    """The device of this process in place of a CUDA one (an index, "cuda", "cuda:0" or a torch.device)."""
    return _device if isinstance(device, int) or str(device).startswith("cuda") else device


def _factory(make: Callable[..., Any]) -> Callable[..., Any]:
    """zeros, empty, … with device="cuda" (mappings.py:91, schedules.py:596, clip_grads.py:90, …) answered here."""

    @functools.wraps(make)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None:
            kwargs["device"] = _here(kwargs["device"])
        kwargs.pop("pin_memory", None)  # rope_utils.py:62
        return make(*args, **kwargs)

    return wrapped


def _torch_stand_in() -> types.ModuleType:
    nothing = _Nothing()
    cpu_random = {
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }
    cuda = _Overlay(
        torch.cuda,
        current_device=lambda: _device,
        set_device=nothing,
        device_count=lambda: 1,  # async_utils.py:488 divides by it
        synchronize=nothing,
        empty_cache=nothing,
        Stream=_Nothing,
        Event=_Nothing,
        stream=lambda _stream: nothing,
        current_stream=lambda *_: nothing,
        default_stream=lambda *_: nothing,
        is_current_stream_capturing=lambda: False,
        nvtx=_Overlay(torch.cuda.nvtx, range_push=nothing, range_pop=nothing, range=nothing),
        random=_Overlay(torch.cuda.random, **cpu_random),
        manual_seed=torch.manual_seed,
        **cpu_random,
    )
    names = ("zeros", "ones", "empty", "empty_like", "full", "tensor", "arange", "rand", "randn")
    return _Overlay(
        torch,
        cuda=cuda,
        distributed=_distributed_stand_in(),
        device=lambda *args, **kwargs: torch.device(*map(_here, args), **{k: _here(v) for k, v in kwargs.items()}),
        **{name: _factory(getattr(torch, name)) for name in names},
    )


def _distributed_stand_in() -> types.ModuleType:
    """gloo refuses parts of unequal size, which experts need under expert-tensor parallelism (mappings.py:150,193)."""
    dist = torch.distributed

    def all_gather(parts: list[torch.Tensor], mine: torch.Tensor, group: Any = None, async_op: bool = False) -> Any:
        if len({part.size(0) for part in parts}) == 1:
            return dist.all_gather(parts, mine, group=group, async_op=async_op)
        largest = max(part.size(0) for part in parts)
        padded = mine.new_zeros(largest, *mine.shape[1:])
        padded[: mine.size(0)] = mine
        received = [mine.new_empty(largest, *mine.shape[1:]) for _ in parts]
        dist.all_gather(received, padded, group=group)
        for part, whole in zip(parts, received, strict=True):
            part.copy_(whole[: part.size(0)])
        return None

    def reduce_scatter(
        out: torch.Tensor,
        parts: list[torch.Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if len({part.size(0) for part in parts}) == 1:
            return dist.reduce_scatter(out, parts, op=op, group=group, async_op=async_op)
        whole = torch.cat(parts)
        dist.all_reduce(whole, op=op, group=group)
        start = sum(part.size(0) for part in parts[: dist.get_rank(group)])
        out.copy_(whole[start : start + out.size(0)])
        return None

    return _Overlay(dist, all_gather=all_gather, reduce_scatter=reduce_scatter)


def _place_stand_in(stand_in: types.ModuleType) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = stand_in


def _import_without_compiling() -> None:
    """jit.py:21 takes torch.compile at import; compiled on a CPU a small MoE's first step takes 22 s, not 0.5 s."""
    real = torch.compile
    torch.compile = lambda function=None, **_: function if function is not None else (lambda wrapped: wrapped)
    try:
        for name in MEGATRON_MODULES:
            importlib.import_module(name)
    finally:
        torch.compile = real


# --- named patches ---------------------------------------------------------------------------------------------------


def _patch_functions() -> None:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.tensor_parallel import random as megatron_random
    from megatron.core.transformer.moe import token_dispatcher

    # random.py:72-110 needs a CUDA generator; the CPU's default generator stands for it
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)

    # moe_utils.py:1093 turns split sizes into arrays only for tensors that are on CUDA
    def split_sizes(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = split_sizes
    # exchange_utils.py:98,106 make the tensor that a rank receives with init_data("cuda")
    init_data = ShardedTensor.init_data
    ShardedTensor.init_data = lambda self, where, *args, **named: init_data(self, _here(where), *args, **named)
    _skip_sorting_in_order()
    _skip_groups_of_one()


def _patch_missing_gemm() -> None:
    """moe_utils.py:1192 names a function that exists only with transformer-engine, on a GPU as on a CPU."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _skip_sorting_in_order() -> None:
    """token_dispatcher.py:732,767 copy tokens by expert, which are in order where a rank holds all experts."""
    from megatron.core.transformer.moe import token_dispatcher

    sort = token_dispatcher.sort_chunks_by_idxs

    @functools.wraps(sort)
    def unless_in_order(tokens: Any, sizes: Any, order: Any, probs: Any = None, fused: bool = False) -> Any:
        if torch.equal(order.cpu(), torch.arange(order.numel())):
            return tokens, probs
        return sort(tokens, sizes, order, probs=probs, fused=fused)

    token_dispatcher.sort_chunks_by_idxs = unless_in_order


def _skip_groups_of_one() -> None:
    """gloo copies the whole buffer twice to reduce it with nobody: experts at EP = DP, or a run of one process."""
    from megatron.core.distributed import param_and_grad_buffer

    def unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(collective)
        def wrapped(output: torch.Tensor, mine: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
            if torch.distributed.get_world_size(group) > 1:
                return collective(output, mine, *args, group=group, **kwargs)
            return None if output.data_ptr() == mine.data_ptr() else output.copy_(mine)

        return wrapped

    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(param_and_grad_buffer, name, unless_alone(getattr(param_and_grad_buffer, name)))


@contextlib.contextmanager
def _cuda_type_names() -> Iterator[None]:
    """Tensor.type() answers torch.cuda.FloatTensor, Tensor.cuda() the tensor itself."""
    real_type, real_cuda = torch.Tensor.type, torch.Tensor.cuda

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return real_type(self).replace("torch.", "torch.cuda.", 1)
        return real_type(self, dtype, *args, **kwargs)

    torch.Tensor.type, torch.Tensor.cuda = type_name, lambda self, *_, **__: self
    try:
        yield
    finally:
        torch.Tensor.type, torch.Tensor.cuda = real_type, real_cuda


def _with_cuda_type_names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with _cuda_type_names():
            return function(*args, **kwargs)

    return wrapped


def _patch_cuda_type_names() -> None:
    """optimizer.py:671, distrib_optimizer.py:361, clip_grads.py:167 compare type names; language_module.py:244 and
    exchange_utils.py:499 call Tensor.cuda()."""
    from megatron.core.dist_checkpointing import exchange_utils
    from megatron.core.models.common.language_module.language_module import LanguageModule
    from megatron.core.optimizer import distrib_optimizer, optimizer

    for owner, name in (
        (distrib_optimizer.DistributedOptimizer, "__init__"),
        (exchange_utils, "exchange_loaded_tensors_broadcast"),
        (optimizer.Float16OptimizerWithFloat16Params, "__init__"),
        (LanguageModule, "setup_embeddings_and_output_layer"),
        (optimizer, "clip_grad_by_total_norm_fp32"),
    ):
        setattr(owner, name, _with_cuda_type_names(getattr(owner, name)))
