"""What FP8 with delayed scaling remembers, as plain tensors of a checkpoint.

Transformer Engine keeps, for every operand of a product, a scale and the maxima of earlier steps (`fp8_meta` of its
modules), and offers them as a pickle. Here they are one tensor per linear layer,

    fp8.decoder.layers.3.self_attention.linear_qkv          [1 + history, 5]
    fp8.decoder.layers.3.mlp.experts.linear_fc1             [experts, 1 + history, 5]

whose first row holds the scales and the others the maxima, newest last but for the row of the step under way, which is
the first of them. The columns are input, weight and output of the forward product, then the gradients of output and
input. Experts count over all ranks. The other recipes take their scales from the tensor at hand and remember nothing.

Megatron reduces the maxima over all tensor, context and data ranks of a pipeline stage, so these hold equal values: one
of them writes a tensor, and every layout can read it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import fp8_utils, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.transformer_config import TransformerConfig

KEY = "fp8"
"""Where the state stands in that of a checkpoint, and what its tensors' names begin with."""

_DIRECTIONS = (("scaling_fwd", 3), ("scaling_bwd", 2))
"""Transformer Engine's names of the forward and backward states, and operands of a product in each."""


def prepare(chunks: list[torch.nn.Module]) -> None:
    """Make the state of delayed scaling now, where the run has it, and not in the first forward pass.

    It can then be loaded into, and copied before the first step.
    """
    if not chunks or not _delayed(chunks[0].config):
        return
    recipe = fp8_utils.get_fp8_recipe(chunks[0].config)
    with torch.no_grad(), fp8_utils.get_fp8_context(chunks[0].config):
        for _, module in _layers(chunks):
            module.fp8_meta |= {"num_gemms": _products(module), "recipe": recipe}
            module.init_fp8_meta_tensors(recipe)


def scaling_tensors(models: list[torch.nn.Module]) -> list[torch.Tensor]:
    """The scales and maxima themselves, which every pass changes in place; none without delayed scaling."""
    states = (
        module.fp8_meta[direction]
        for model in models
        for module in model.modules()
        if _is_linear(module)
        for direction, _ in _DIRECTIONS
        if direction in module.fp8_meta
    )
    return [tensor for state in states if hasattr(state, "scale") for tensor in (state.scale, state.amax_history)]


def reset(models: list[torch.nn.Module]) -> None:
    """Begin anew: scales of one, and no maxima."""
    tensors = scaling_tensors(models)
    for scale, maxima in zip(tensors[::2], tensors[1::2], strict=True):
        scale.fill_(1.0)
        maxima.zero_()


@contextlib.contextmanager
def unchanged(models: list[torch.nn.Module]) -> Iterator[None]:
    """Passes inside leave the scales and maxima of training as they were."""
    tensors = scaling_tensors(models)
    kept = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        for tensor, copy in zip(tensors, kept, strict=True):
            tensor.copy_(copy)


@contextlib.contextmanager
def without_pickles(chunk: torch.nn.Module) -> Iterator[None]:
    """Transformer Engine's modules offer no extra state inside, so that none is pickled for nothing."""
    flags = ("fp8", "fp8_calibration")
    modules = [module for module in chunk.modules() if hasattr(module, "fp8_meta")]
    kept = [[getattr(module, flag) for flag in flags] + [module.fp8_meta["fp8_checkpoint"]] for module in modules]
    try:
        for module in modules:
            _set_flags(module, False, False, False)
        yield
    finally:
        for module, values in zip(modules, kept, strict=True):
            _set_flags(module, *values)


def _set_flags(module: Any, fp8: bool, calibration: bool, checkpoint: bool) -> None:
    module.fp8, module.fp8_calibration, module.fp8_meta["fp8_checkpoint"] = fp8, calibration, checkpoint


def scaling_state(chunks: list[torch.nn.Module], history: int | None = None) -> dict[str, ShardedTensor]:
    """The state of delayed scaling as `dist_checkpointing` saves and loads it, by name; empty without it.

    Args:
        history: steps of the maxima in a checkpoint to be read, where it had another number of them.
    """
    if not chunks or not _delayed(chunks[0].config):
        return {}
    return {f"{KEY}.{name}": _sharded(f"{KEY}.{name}", module, history) for name, module in _layers(chunks)}


def load_scaling_state(chunks: list[torch.nn.Module], state: dict[str, torch.Tensor]) -> None:
    """Put loaded scales and maxima into the modules; of a longer history the newest steps."""
    for name, module in _layers(chunks):
        _unpack(state[f"{KEY}.{name}"], module)


def _delayed(config: TransformerConfig) -> bool:
    return bool(config.fp8) and config.fp8_recipe == "delayed"


def _is_linear(module: torch.nn.Module) -> bool:
    """One of Transformer Engine's (grouped) linear layers. Its attention has no weights, and its norms no FP8."""
    return hasattr(module, "fp8_meta") and any(True for _ in module.parameters(recurse=False))


def _layers(chunks: list[torch.nn.Module]) -> Iterator[tuple[str, Any]]:
    """Linear layers with the names they have in the whole model."""
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            for name, module in layer.named_modules():
                if _is_linear(module):
                    yield f"decoder.layers.{layer.layer_number - 1}.{name}", module


def _products(module: Any) -> int:
    """Products of a module: its experts on this rank, else one."""
    return getattr(module, "num_gemms", 1)


def _grouped(module: Any) -> bool:
    return hasattr(module, "num_gemms")


def _sharded(key: str, module: Any, history: int | None) -> ShardedTensor:
    data = _pack(module)
    if history is not None:
        data = data.new_zeros(data.size(0), 1 + history, data.size(2))
    if _grouped(module):
        rank, ranks = (
            parallel_state.get_expert_model_parallel_rank(),
            parallel_state.get_expert_model_parallel_world_size(),
        )
        copy = (0, parallel_state.get_expert_tensor_parallel_rank(), parallel_state.get_expert_data_parallel_rank())
        return ShardedTensor.from_rank_offsets(key, data, (0, rank, ranks), replica_id=copy)
    data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    copy = (0, parallel_state.get_tensor_model_parallel_rank(), data_rank)
    return ShardedTensor.from_rank_offsets(key, data[0], replica_id=copy)


def _pack(module: Any) -> torch.Tensor:
    """`[products, 1 + history, operands]`, a copy on the host."""
    parts = []
    for direction, operands in _DIRECTIONS:
        state = module.fp8_meta[direction]
        rows = torch.cat([state.scale[None], state.amax_history])  # [1 + history, products * operands]
        parts.append(rows.unflatten(1, (_products(module), operands)).transpose(0, 1))
    return torch.cat(parts, dim=2).cpu().contiguous()


def _unpack(packed: torch.Tensor, module: Any) -> None:
    """The reverse of `_pack`, in place: Transformer Engine holds on to these tensors."""
    whole = packed if _grouped(module) else packed[None]
    for (direction, _), part in zip(
        _DIRECTIONS, whole.split([operands for _, operands in _DIRECTIONS], 2), strict=True
    ):
        state = module.fp8_meta[direction]
        rows = part.transpose(0, 1).flatten(1)
        state.scale.copy_(rows[0])
        state.amax_history.copy_(_fitted(rows[1:], state.amax_history.size(0)))


def _fitted(history: torch.Tensor, length: int) -> torch.Tensor:
    """Maxima `[steps, …]` for another number of steps: the row under way, then zeros or the newest of the others."""
    current, earlier = history[:1], history[1:]
    kept = earlier[max(0, earlier.size(0) - (length - 1)) :] if length > 1 else earlier[:0]
    missing = history.new_zeros(length - 1 - kept.size(0), history.size(1))
    return torch.cat([current, missing, kept])
