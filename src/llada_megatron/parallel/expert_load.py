"""How many tokens each expert receives, counted where the router decides, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter

from llada_megatron.parallel import device


class ExpertLoad:
    """Counts tokens per expert of every MoE layer of the model chunks on this rank.

    Training is counted under gradient mode only: full recomputation runs the router a first time without gradients and
    a second time with, so each token counts once; validation is left out. Tokens are distinct on data, context and
    (with sequence parallelism, which Megatron demands of MoE training) tensor ranks, hence the sum over all ranks.
    """

    def __init__(self, model_chunks: Iterable[torch.nn.Module], training: bool = True) -> None:
        """`training` false counts every forward pass instead: the load of an evaluation."""
        self._training = training
        self._counts: dict[int, torch.Tensor] = {}
        self._hooks = []
        self._shape, self._agreed = (0, 0), False
        for chunk in model_chunks:
            for module in chunk.modules():
                if isinstance(module, TopKRouter):
                    self._watch(module)

    def _watch(self, router: TopKRouter) -> None:
        config = router.config
        self._shape = (config.num_layers, config.num_moe_experts)
        layer = router.layer_number  # from 1, over all pipeline stages
        self._counts[layer] = torch.zeros(config.num_moe_experts, dtype=torch.int64, device=router.weight.device)

        def count(module: torch.nn.Module, _inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            if not self._training or (module.training and torch.is_grad_enabled()):
                routing_map = output[1].detach()  # [tokens, experts], one where a token goes to an expert
                counts = self._counts[layer] = self._counts[layer].to(routing_map.device)
                counts += (routing_map != 0).sum(dim=0)

        self._hooks.append(router.register_forward_hook(count))

    def counters(self) -> list[torch.Tensor]:
        """The counts on this rank since the last `reduce`, one `[experts]` a layer."""
        return list(self._counts.values())

    def reset(self) -> None:
        """Forget what was counted since the last `reduce`."""
        for counts in self._counts.values():
            counts.zero_()

    def reduce(self) -> dict[int, list[int]]:
        """Tokens per expert since the last call, over all ranks: {layer (from 1): counts `[experts]`}.

        Collective where a process group exists. Layers without a router are left out.
        """
        layers, experts = self._global_shape()
        if experts == 0:
            return {}
        table = torch.zeros(layers, experts + 1, dtype=torch.int64, device=device.current())
        for layer, counts in self._counts.items():
            table[layer - 1, :experts] = counts
            table[layer - 1, experts] = 1  # marks a layer that has a router, even if no token came
            counts.zero_()
        if dist.is_initialized():
            dist.all_reduce(table)
        return {i + 1: row[:experts] for i, row in enumerate(table.tolist()) if row[experts] > 0}

    def _global_shape(self) -> tuple[int, int]:
        """Layers and experts; a stage that holds only dense layers learns them from the others, once."""
        if not self._agreed and dist.is_initialized():
            shape = torch.tensor(self._shape, dtype=torch.int64, device=device.current())
            dist.all_reduce(shape, op=dist.ReduceOp.MAX)
            layers, experts = shape.tolist()
            self._shape = (layers, experts)
        self._agreed = True
        return self._shape

    def close(self) -> None:
        """Takes the hooks off again."""
        for hook in self._hooks:
            hook.remove()


@dataclass(frozen=True)
class LayerLoad:
    """Balance of one layer: busiest expert relative to the mean (1 = even), and experts without a token."""

    max_over_mean: float
    dead: int


def summarize(counts: dict[int, list[int]]) -> dict[int, LayerLoad]:
    """Balance of each layer from `ExpertLoad.reduce`; a layer without any token is even and wholly dead."""
    return {layer: _summarize_layer(row) for layer, row in counts.items()}


def _summarize_layer(row: list[int]) -> LayerLoad:
    mean = sum(row) / len(row)
    return LayerLoad(max_over_mean=max(row) / mean if mean else 1.0, dead=sum(c == 0 for c in row))


def load_scalars(counts: dict[int, list[int]]) -> dict[str, float]:
    """The balance as scalars for `MetricsWriter`: per layer, and the worst of all layers."""
    summary = summarize(counts)
    if not summary:
        return {}
    scalars: dict[str, float] = {
        "expert_load/max_over_mean": max(s.max_over_mean for s in summary.values()),
        "expert_load/dead": sum(s.dead for s in summary.values()),
    }
    for layer, load in summary.items():
        scalars[f"expert_load/layer_{layer:02d}/max_over_mean"] = load.max_over_mean
        scalars[f"expert_load/layer_{layer:02d}/dead"] = load.dead
    return scalars
