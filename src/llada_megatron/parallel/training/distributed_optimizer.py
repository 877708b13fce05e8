"""AdamW with its state sharded over data-parallel ranks: Megatron's distributed optimizer."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, clip_grads, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import optimizer as megatron
from megatron.core.utils import local_multi_tensor_l2_norm

from llada_megatron.llada_moe.config.optimizer import OptimizerConfig, learning_rate
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.model.spec import transformer_engine_active
from llada_megatron.parallel import device, host_group
from llada_megatron.parallel.fp8 import recipes
from llada_megatron.parallel.training import optimizer_shards


def build_optimizer(run: RunConfig, models: list[DistributedDataParallel]) -> MegatronOptimizer:
    """AdamW with clipping, fp32 main weights for bf16, sharded over data-parallel ranks; only matrices decay."""
    settings = run.optimizer
    bf16 = run.training.precision == "bf16"
    if settings.low_precision:
        _require_fused_adam(settings.low_precision, bf16)
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.learning_rate.peak,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.epsilon,
            weight_decay=settings.weight_decay,
            clip_grad=settings.clip_grad_norm or math.inf,  # the norm is measured even where nothing is clipped
            use_distributed_optimizer=True,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            overlap_param_gather=run.layout.overlap_param_gather,
            **_state_types(settings),
            **recipes.optimizer_fields(run.training.fp8),
        ),
        models,
        use_gloo_process_groups=False,
    )
    _set_weight_decay(optimizer, settings.weight_decay)
    _fuse_torch_adam(optimizer)
    return optimizer


def _state_types(settings: OptimizerConfig) -> dict[str, Any]:
    """Megatron's fields for gradients and moments that are not in fp32. Main weights stay in fp32, whole: their lower
    halves alone (`store_param_remainders`) could not be loaded by a run of another kind."""
    if not settings.low_precision:
        return {}
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.uint8}
    return {
        "use_precision_aware_optimizer": True,
        "store_param_remainders": False,
        "main_grads_dtype": types[settings.main_grads_dtype],
        "exp_avg_dtype": types[settings.exp_avg_dtype],
        "exp_avg_sq_dtype": types[settings.exp_avg_sq_dtype],
    }


def _require_fused_adam(wanted: list[str], bf16: bool) -> None:
    """Refuse what torch's AdamW cannot hold. Raises ConfigError."""
    if not bf16:
        raise ConfigError(f"optimizer.{wanted[0]} needs training.precision bf16; use fp32")
    if not transformer_engine_active():
        raise ConfigError(
            f"optimizer.{wanted[0]} needs FusedAdam of Transformer Engine on a GPU, which this process does not have "
            "(`llada env` says why); use fp32"
        )


def _set_weight_decay(optimizer: MegatronOptimizer, weight_decay: float) -> None:
    """Megatron marks the groups of vectors with a factor of 0, which its scheduler (not used here) would apply."""
    for part in _parts(optimizer):
        for group in part.param_groups:
            group["weight_decay"] = weight_decay * group["wd_mult"]


def _fuse_torch_adam(optimizer: MegatronOptimizer) -> None:
    """On a CPU the optimizer is torch's AdamW, whose fused kernel takes a third of the time of the default loop."""
    if device.cuda_available():
        return
    for part in _parts(optimizer):
        if isinstance(part.optimizer, torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"] = True


def set_learning_rate(run: RunConfig, optimizer: MegatronOptimizer, step: int, factor: float = 1.0) -> float:
    """Set the rate of update number `step` (from 0), times `factor`, in every group; returns it."""
    rate = learning_rate(run.optimizer.learning_rate, step, run.training.steps) * factor
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def gradient_norm(optimizer: MegatronOptimizer) -> float | torch.Tensor:
    """Norm of the prepared gradients over all ranks and optimizers; a tensor where Megatron leaves it on the GPU.

    Where experts have an optimizer with groups of its own, Megatron reads the norm of every optimizer to add them up
    (0.19 optimizer.py:1773): a wait for the device each.
    """
    parts = _parts(optimizer)
    if len(parts) == 1 or optimizer.grads_states_parallel_group_is_shared():
        return _norm_of(parts, optimizer)
    norms = [_norm_of([part], part) for part in parts]
    if not any(map(torch.is_tensor, norms)):
        return math.sqrt(sum(norm**2 for norm in norms))
    return torch.stack([torch.as_tensor(norm).reshape(()) for norm in norms]).square().sum().sqrt()


def _norm_of(parts: list[MegatronOptimizer], whole: MegatronOptimizer) -> float | torch.Tensor:
    """Norm of the gradients of optimizers that share the ranks of `whole`.

    With neither Transformer Engine nor Apex, Megatron reads the norm of every parameter (core/utils.py:1206), a wait
    for the GPU each; torch's takes that place there.
    """
    squares = torch.zeros(1, device=device.current())
    if clip_grads.l2_norm_impl is not local_multi_tensor_l2_norm or not squares.is_cuda:
        return whole.get_grad_norm()
    gradients = [gradient for part in parts for gradient in _gradients(part)]
    if gradients:
        squares += torch.nn.utils.get_total_norm(gradients).square()
    torch.distributed.all_reduce(squares, group=whole.get_grad_stats_parallel_group())
    return squares.sqrt()


def _gradients(part: MegatronOptimizer) -> list[torch.Tensor]:
    """What counts for the norm, each once among the ranks (another name since megatron-core 0.19)."""
    name = "get_grads_for_grad_norm" if hasattr(part, "get_grads_for_grad_norm") else "get_main_grads_for_grad_norm"
    return getattr(part, name)()


def clips_by_tensor() -> bool:
    """Whether Megatron clips by a norm that is on the GPU: 0.19 does, with Transformer Engine."""
    return getattr(clip_grads, "multi_tensor_scale_tensor_impl", None) is not None


def clip_gradients(optimizer: MegatronOptimizer, norm: float | torch.Tensor) -> None:
    """Scale prepared gradients, whose norm over all ranks and optimizers is given, down to the configured norm.

    Megatron's `step` clips in the same way (0.16 optimizer.py:1308), but updates whatever the norm turns out to be.
    """
    if not clips_by_tensor():
        norm = float(norm)
    for part in _parts(optimizer):
        parameters = part.get_parameters()
        if parameters:
            megatron.clip_grad_by_total_norm_fp32(
                parameters,
                max_norm=part.config.clip_grad,
                total_norm=norm,
                # where Adam's tensors have types of their own, the gradients stand beside the weights, not in `.grad`
                use_decoupled_grad=part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8,
            )


def optimizer_state(optimizer: MegatronOptimizer, model: dict[str, Any], loading: bool) -> dict[str, Any]:
    """Sharded optimizer state; `model` is the sharded model state (of all chunks) that its tensors are keyed by.

    Only what training changes is kept: main weights, both moments, and the number of updates. Everything else in
    Megatron's parameter groups is configuration, and how many optimizers there are (one more when experts are spread)
    the layout's. Collective where it is saved.
    """
    _fill_fresh_adam(optimizer, loading)
    state = optimizer_shards.empty_state if loading else optimizer_shards.saved_state
    return {
        "updates": 0 if loading else _updates(optimizer),
        "shards": {
            str(index): state(part, model) if _holds_parameters(part) else {}
            for index, part in enumerate(_parts(optimizer))
        },
    }


def load_optimizer_state(optimizer: MegatronOptimizer, model: dict[str, Any], state: dict[str, Any]) -> None:
    """Put loaded state into the optimizer, whatever layout it was saved under; `model` as for `optimizer_state`."""
    for index, part in enumerate(_parts(optimizer)):
        if not _holds_parameters(part):
            continue
        own = part.state_dict()
        for group in own["optimizer"]["param_groups"]:
            group["step"] = state["updates"]
        part.load_state_dict(own)
        optimizer_shards.load_state(part, model, state["shards"][str(index)])


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _holds_parameters(part: MegatronOptimizer) -> bool:
    """Whether this rank trains anything in this optimizer: of frozen weights there may be none, and then Megatron makes
    one without Adam, or on a stage or data-parallel rank one without parameters, whose state it cannot tell."""
    return part.optimizer is not None and any(group["params"] for group in part.optimizer.param_groups)


def _updates(optimizer: MegatronOptimizer) -> int:
    """Number of updates done, which Megatron keeps in every non-empty parameter group; rank 0, which writes it, may
    have none (collective)."""
    states = [part.state_dict() for part in _parts(optimizer) if _holds_parameters(part)]
    groups = [group for state in states for group in state["optimizer"]["param_groups"]]
    updates = torch.tensor(int(max((group.get("step") or 0 for group in groups), default=0)))
    host_group.world().all_reduce(updates, torch.distributed.ReduceOp.MAX)
    return int(updates)


def _fill_fresh_adam(optimizer: MegatronOptimizer, loading: bool) -> None:
    """Adam makes its state at the first step; a template to load into and a checkpoint of step 0 need it before.

    torch's AdamW is filled here (distrib_optimizer.py:642); for others Megatron does it, but where Transformer Engine's
    keeps low-precision state, since its `initialize_state` has an argument that Megatron does not pass.
    """
    for part in filter(_holds_parameters, _parts(optimizer)):
        adam = part.optimizer
        if isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
            _fill_torch_adam(adam)
        elif not loading and part.config.use_precision_aware_optimizer:
            _fill_engine_adam(adam)
        elif not loading:
            part.init_state_fn(adam, part.config)
        if loading:
            part.load_state_dict(part.state_dict())


def _fill_engine_adam(adam: Any) -> None:
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                adam.initialize_state(parameter, adam.store_param_remainders)


def _fill_torch_adam(adam: torch.optim.Optimizer) -> None:
    for group in adam.param_groups:
        for parameter in group["params"]:
            if not adam.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                adam.state[parameter] = {"step": torch.tensor(0.0), **zeros}
