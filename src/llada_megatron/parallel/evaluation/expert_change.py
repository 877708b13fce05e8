"""Advice applied to a loaded model: experts in another order, biases added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from numpy.typing import NDArray

from llada_megatron.llada_moe.model.experts import expert_weights


@torch.no_grad()
def permute_experts(model: torch.nn.Module, orders: Mapping[int, Sequence[int]]) -> None:
    """Put the experts of each layer (from 1) in another order, the router's rows with them: the same function.

    `orders`: the expert that comes to each place. The model is whole on this rank.

    Raises:
        ValueError: an order is no permutation of a layer's experts.
    """
    for layer in _moe_layers(model):
        order = orders.get(layer.layer_number)
        if order is None:
            continue
        if sorted(order) != list(range(layer.config.num_moe_experts)):
            raise ValueError(f"layer {layer.layer_number}: {list(order)} is no order of its experts")
        router = layer.router
        rows = [router.weight, getattr(router, "bias", None), *router.buffers()]
        for tensor in rows:
            if tensor is not None and tensor.dim() > 0 and tensor.size(0) == len(order):
                tensor.copy_(tensor[torch.tensor(list(order), device=tensor.device)])
        for weights in expert_weights(layer.experts):
            kept = [weight.detach().clone() for weight in weights]
            for place, expert in enumerate(order):
                weights[place].copy_(kept[expert])


@torch.no_grad()
def add_bias(model: torch.nn.Module, biases: Mapping[int, NDArray[np.float32]]) -> None:
    """Add to the expert biases of layers (from 1). Raises ValueError: a layer's router has none."""
    for layer in _moe_layers(model):
        bias = biases.get(layer.layer_number)
        if bias is None:
            continue
        if layer.router.expert_bias is None:
            raise ValueError(f"layer {layer.layer_number}: its router has no expert bias")
        layer.router.expert_bias += torch.from_numpy(bias).to(layer.router.expert_bias.device)


def _moe_layers(model: torch.nn.Module) -> list[MoELayer]:
    return [module for module in model.modules() if isinstance(module, MoELayer)]
