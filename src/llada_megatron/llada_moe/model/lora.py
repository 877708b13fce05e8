"""Low-rank factors (LoRA, arXiv 2106.09685) beside Megatron's parallel linear layers: y = x W^T + s (x A^T) B^T.

`adapt` gives a built layer two more parameters, `lora_A` `[rank, input]` and `lora_B` `[output, rank]`, and a class
that adds their product in the forward pass and names them in the sharded state. The layer's own weight keeps its name,
so that a checkpoint with factors is a checkpoint of the model with some tensors more. A factor is cut over the tensor
ranks where the weight is: B of a column-parallel layer by rows, A of a row-parallel one by columns. The other is equal
on all of them, and what travels is `rank` wide. It works the same beside Transformer Engine's layers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn.functional import linear

from llada_megatron.llada_moe.config.trained_parts import EXPERTS, FACTORS, LoRAConfig, place_of
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.model.factor_product import product_of_factors

_COLUMN_PARALLEL = ("linear_qkv", "linear_fc1")
_GATED = "linear_fc1"


class _Adapted:
    """Mixed into the class of a linear layer that has factors."""

    lora_A: torch.nn.Parameter
    lora_B: torch.nn.Parameter
    lora_scale: float
    lora_place: str
    lora_group: Any
    """The tensor ranks that the layer is cut over."""

    @property
    def by_columns(self) -> bool:
        """Whether tensor ranks hold rows of the weight (Megatron's column-parallel layer), not columns."""
        return self.lora_place.endswith(_COLUMN_PARALLEL)

    def forward(self, input_: torch.Tensor, *args: Any, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the layer computes, and the product of the factors added to it."""
        output, bias = super().forward(input_, *args, **arguments)  # type: ignore[misc]
        inner = self._exchanged(linear(input_, self.lora_A)) * self.lora_scale
        return output + linear(inner, self.lora_B), bias

    def _exchanged(self, inner: torch.Tensor) -> torch.Tensor:
        """x A^T `[seq, batch, rank]` as this rank's B takes it: the same collectives that the layer's own input or
        output has."""
        if self.lora_group.size() == 1:
            return inner
        if self.config.sequence_parallel:  # type: ignore[attr-defined]
            exchange = (
                gather_from_sequence_parallel_region if self.by_columns else reduce_scatter_to_sequence_parallel_region
            )
        else:
            exchange = (
                copy_to_tensor_model_parallel_region if self.by_columns else reduce_from_tensor_model_parallel_region
            )
        return exchange(inner, group=self.lora_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The layer's own, and both factors under the same prefix."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        state |= make_sharded_tensors_for_checkpoint(
            {name: getattr(self, name) for name in FACTORS},
            prefix,
            {"lora_B": 0} if self.by_columns else {"lora_A": 1},
            sharded_offsets,
            tp_group=self.lora_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        if self.lora_place.endswith(_GATED):  # B has the rows of gate and up, which are cut apart
            key = f"{prefix}lora_B"
            state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
        return state

    def merged_weight(self) -> torch.Tensor:
        """This rank's part of W + s B A, in the weight's type, rounded once."""
        weight: torch.Tensor = self.weight  # type: ignore[attr-defined]
        return (weight.float() + product_of_factors(self.lora_A, self.lora_B, self.lora_scale)).to(weight.dtype)


@functools.cache
def _class_with_factors(base: type[torch.nn.Module]) -> type[torch.nn.Module]:
    return type(f"Adapted{base.__name__}", (_Adapted, base), {"base": base})


def adapt(chunk: torch.nn.Module, lora: LoRAConfig) -> None:
    """Give the targeted layers of a model's chunk their factors, uninitialised.

    Raises:
        ConfigError: the weights of all experts are one module, as Transformer Engine keeps them.
    """
    for name, module in list(chunk.named_modules()):
        place = place_of(name)
        if place is None or not lora.adapts(place):
            continue
        if not hasattr(module, "weight"):
            raise ConfigError(f"training.lora.targets: {place} is one {type(module).__name__} of all experts here")
        _add_factors(module, lora, place)


def _add_factors(layer: torch.nn.Module, lora: LoRAConfig, place: str) -> None:
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    routed = place.startswith(EXPERTS)
    layer.__class__ = _class_with_factors(type(layer))
    assert isinstance(layer, _Adapted)
    layer.lora_scale, layer.lora_place = lora.scale, place
    layer.lora_group = (
        parallel_state.get_expert_tensor_parallel_group()
        if routed
        else parallel_state.get_tensor_model_parallel_group()
    )
    layer.lora_A = torch.nn.Parameter(weight.new_empty(lora.rank, weight.size(1)))
    layer.lora_B = torch.nn.Parameter(weight.new_empty(weight.size(0), lora.rank))
    cut, whole = (layer.lora_B, layer.lora_A) if layer.by_columns else (layer.lora_A, layer.lora_B)
    set_tensor_model_parallel_attributes(cut, True, 0 if layer.by_columns else 1, 1)
    # under sequence parallelism each tensor rank has the gradient of its own positions, which Megatron adds up
    whole.sequence_parallel = layer.config.sequence_parallel and not routed  # type: ignore[attr-defined]
    for factor in (cut, whole):
        factor.allreduce = getattr(weight, "allreduce", True)  # type: ignore[attr-defined]


def adapted_layers(module: torch.nn.Module) -> Iterator[Any]:
    """Every layer inside that has factors."""
    return (layer for layer in module.modules() if isinstance(layer, _Adapted))


def has_factors(experts: torch.nn.Module) -> bool:
    """Whether routed experts, all of them or none, have factors beside a matrix."""
    if not isinstance(experts, SequentialMLP):
        return False
    first = experts.local_experts[0]
    return isinstance(first.linear_fc1, _Adapted) or isinstance(first.linear_fc2, _Adapted)


@torch.no_grad()
def merge(chunks: Iterable[torch.nn.Module]) -> None:
    """Add the product of its factors to each weight, and make the layers what they were before `adapt`."""
    for layer in [layer for chunk in chunks for layer in adapted_layers(chunk)]:
        layer.weight.copy_(layer.merged_weight())
        for name in (*FACTORS, "lora_scale", "lora_place", "lora_group"):
            delattr(layer, name)
        layer.__class__ = type(layer).base


ExpertFactors = tuple[list[torch.Tensor], list[torch.Tensor], float]
"""A of every expert, B of every expert, and the scale."""


def expert_factors(experts: SequentialMLP) -> tuple[ExpertFactors | None, ExpertFactors | None]:
    """The factors of the first and of the second matrices of all experts; None where these have none."""
    first = _factors([expert.linear_fc1 for expert in experts.local_experts])
    return first, _factors([expert.linear_fc2 for expert in experts.local_experts])


def _factors(layers: list[Any]) -> ExpertFactors | None:
    """Of the same layer of all experts. A factor that every expert-tensor rank holds whole gets the sum of their
    gradients, since each computes with its part of the weight."""
    if not isinstance(layers[0], _Adapted):
        return None
    group = layers[0].lora_group

    def summed(factor: torch.Tensor, whole: bool) -> torch.Tensor:
        return copy_to_tensor_model_parallel_region(factor, group=group) if whole and group.size() > 1 else factor

    return (
        [summed(layer.lora_A, layer.by_columns) for layer in layers],
        [summed(layer.lora_B, not layer.by_columns) for layer in layers],
        layers[0].lora_scale,
    )
