"""How many tokens each expert receives, counted where the router decides, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import unwrap_model

from llada_megatron.llada_moe.evaluation.expert_balance import ExpertBalance, balance_of
from llada_megatron.llada_moe.evaluation.mask_ratio_bins import BINS, bin_of
from llada_megatron.parallel import device

_WRAPPERS = (DistributedDataParallel, Float16Module)
"""Named, because Megatron's own choice of them would import all that it has."""


def tell_mask_ratio(model_chunk: torch.nn.Module, mask_ratio: torch.Tensor) -> None:
    """Say what the mask ratios `[batch]` of the next pass of a chunk are, for what counts by them."""
    unwrap_model(model_chunk, _WRAPPERS).mask_ratio = mask_ratio


class TrainingPasses:
    """Whether a training pass of a model chunk is under way, and the mask ratios of its sequences.

    Layers that run again in the backward pass do so outside of the chunk's forward pass, so that what is counted inside
    counts once whatever is recomputed. Validation (evaluation mode) and passes without gradients are left out.
    """

    def __init__(self, model_chunks: Iterable[torch.nn.Module]) -> None:
        self.under_way = False
        self.bins: torch.Tensor | None = None
        """`[batch]` int64: bin of each sequence's mask ratio; None where the pass does not say."""
        self._hooks = []
        for chunk in model_chunks:
            self._hooks.append(chunk.register_forward_pre_hook(self._begin))
            self._hooks.append(chunk.register_forward_hook(self._end, always_call=True))

    def _begin(self, chunk: torch.nn.Module, _inputs: Any) -> None:
        self.under_way = chunk.training and torch.is_grad_enabled()
        ratio = getattr(unwrap_model(chunk, _WRAPPERS), "mask_ratio", None) if self.under_way else None
        self.bins = None if ratio is None else bin_of(ratio)

    def _end(self, _chunk: torch.nn.Module, _inputs: Any, _output: Any) -> None:
        self.under_way, self.bins = False, None

    def close(self) -> None:
        """Takes the hooks off again."""
        for hook in self._hooks:
            hook.remove()


class ExpertLoad:
    """Counts tokens per expert and mask ratio of every MoE layer of the model chunks on this rank.

    Tokens are distinct on data, context and (with sequence parallelism, which Megatron demands of MoE training) tensor
    ranks, hence the sum over all ranks.
    """

    def __init__(
        self, model_chunks: Iterable[torch.nn.Module], training: bool = True, passes: TrainingPasses | None = None
    ) -> None:
        """`training` false counts every forward pass instead, without mask ratios: the load of an evaluation.

        `passes`: the training passes of these chunks, if others watch them too.
        """
        chunks = list(model_chunks)
        self._own = TrainingPasses(chunks) if training and passes is None else None
        self._passes = (passes or self._own) if training else None
        self._bins = BINS if training else 1
        routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)]
        self.layers = [router.layer_number for router in routers]  # from 1, over all pipeline stages
        config = routers[0].config if routers else None
        self._shape = (config.num_layers, config.num_moe_experts) if config is not None else (0, 0)
        where = routers[0].weight.device if routers else None
        self._table = torch.zeros(len(routers), self._bins, self._shape[1], dtype=torch.int64, device=where)
        self._agreed = False
        self._hooks = [self._watch(router, counts) for router, counts in zip(routers, self._table, strict=True)]

    def _watch(self, router: TopKRouter, counts: torch.Tensor) -> Any:
        def count(module: torch.nn.Module, _inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            if self._passes is not None and not self._passes.under_way:
                return
            chosen = (output[1].detach() != 0).to(counts.device)  # [tokens, experts], tokens sequence-major
            bins = None if self._passes is None else self._passes.bins
            if bins is None:
                counts[-1] += chosen.sum(dim=0)
            elif bins.numel() == 1:
                counts.index_add_(0, bins.to(counts.device), chosen.sum(dim=0, keepdim=True))
            else:
                by_sequence = chosen.view(-1, bins.numel(), chosen.size(1)).sum(dim=0)
                counts.index_add_(0, bins.to(counts.device), by_sequence)

        return router.register_forward_hook(count)

    def counters(self) -> list[torch.Tensor]:
        """The counts on this rank since the last `reduce`, in one tensor `[layers of this rank, bins, experts]`."""
        return [self._table]

    def reset(self) -> None:
        """Forget what was counted since the last `reduce`."""
        self._table.zero_()

    def reduce(self) -> dict[int, list[int]]:
        """Tokens per expert since the last call, over all ranks: {layer (from 1): counts `[experts]`}.

        Collective where a process group exists. Layers without a router are left out.
        """
        return {
            layer: [sum(column) for column in zip(*bins, strict=True)] for layer, bins in self.reduce_bins().items()
        }

    def reduce_bins(self) -> dict[int, list[list[int]]]:
        """The same by mask ratio: {layer: counts `[bins][experts]`} (see `evaluation.mask_ratio_bins`)."""
        layers, experts = self._global_shape()
        if experts == 0:
            return {}
        table = torch.zeros(layers, self._bins * experts + 1, dtype=torch.int64, device=device.current())
        for layer, counts in zip(self.layers, self._table, strict=True):
            table[layer - 1, :-1] = counts.flatten()
            table[layer - 1, -1] = 1  # marks a layer that has a router, even if no token came
        self.reset()
        if dist.is_initialized():
            dist.all_reduce(table)
        return {
            number: [row[start : start + experts] for start in range(0, self._bins * experts, experts)]
            for number, row in enumerate(table.tolist(), start=1)
            if row[-1] > 0
        }

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
        if self._own is not None:
            self._own.close()


def summarize(counts: dict[int, list[int]]) -> dict[int, ExpertBalance]:
    """Balance of each layer from `ExpertLoad.reduce`; a layer without any token is even and wholly dead."""
    return {layer: balance_of(row) for layer, row in counts.items()}


def load_scalars(counts: dict[int, list[int]]) -> dict[str, float]:
    """The balance as scalars for `MetricsWriter`: the worst of all layers, and two figures of each."""
    summary = summarize(counts)
    if not summary:
        return {}
    scalars: dict[str, float] = {
        "expert_load/max_over_mean": max(s.max_over_mean for s in summary.values()),
        "expert_load/variation": max(s.variation for s in summary.values()),
        "expert_load/entropy": min(s.entropy for s in summary.values()),
        "expert_load/dead": sum(s.dead for s in summary.values()),
        "expert_load/overloaded": sum(s.overloaded for s in summary.values()),
    }
    for layer, load in summary.items():
        scalars[f"expert_load/layer_{layer:02d}/max_over_mean"] = load.max_over_mean
        scalars[f"expert_load/layer_{layer:02d}/dead"] = load.dead
    return scalars
