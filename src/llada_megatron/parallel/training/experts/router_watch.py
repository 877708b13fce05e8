"""What the routers do beside choosing: the size of their logits, and where their biases have gone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter

from llada_megatron.parallel import device
from llada_megatron.parallel.expert_load import TrainingPasses


@dataclass(frozen=True)
class RouterState:
    """One layer's router."""

    z: float
    """Mean over tokens of the squared logsumexp of the logits: the z-loss before its coefficient (arXiv 2202.08906)."""
    bias_range: float | None
    """Largest minus smallest expert bias; None without a bias."""
    bias_drift: float | None
    """Mean absolute change of the experts' biases since the last reading."""


class RouterWatch:
    """Looks at the logits of the first training pass after each reading, and at the biases at each reading."""

    def __init__(self, models: Iterable[torch.nn.Module], passes: TrainingPasses) -> None:
        self._passes = passes
        self._routers = [module for model in models for module in model.modules() if isinstance(module, TopKRouter)]
        self._z: dict[int, torch.Tensor] = {}
        self._biases = [self._bias(router) for router in self._routers]
        for router in self._routers:
            self._watch(router)

    @staticmethod
    def _bias(router: TopKRouter) -> torch.Tensor | None:
        bias = getattr(router, "expert_bias", None)
        return None if bias is None else bias.detach().clone()

    def _watch(self, router: TopKRouter) -> None:
        gating, layer = router.gating, router.layer_number  # a method, which no hook reaches

        def watched(*inputs: Any, **named: Any) -> torch.Tensor:
            logits = gating(*inputs, **named)
            self.look(layer, logits)
            return logits

        router.gating = watched

    def look(self, layer: int, logits: torch.Tensor) -> None:
        """See the logits `[…, experts]` of a pass of a layer."""
        if self._passes.under_way and layer not in self._z:
            self._z[layer] = logits.detach().float().logsumexp(dim=-1).square().mean()

    def reset(self) -> None:
        """Forget the logits seen since the last reading."""
        self._z.clear()

    def read(self, layers: int) -> dict[int, RouterState]:
        """The state of every router of the model, by layer from 1, the mean over the ranks that hold it (collective).

        `layers`: those of the whole model.
        """
        table = torch.zeros(layers, 5, dtype=torch.float64, device=device.current())
        for number, router in enumerate(self._routers):
            row = table[router.layer_number - 1]
            if router.layer_number in self._z:
                row[0] += self._z[router.layer_number]
                row[1] += 1
            before, bias = self._biases[number], self._bias(router)
            if before is not None and bias is not None:
                row[2] += bias.max() - bias.min()
                row[3] += (bias - before).abs().mean()
                row[4] += 1
                self._biases[number] = bias
        self.reset()
        torch.distributed.all_reduce(table)
        return {
            layer: RouterState(z / seen, span / held if held else None, drift / held if held else None)
            for layer, (z, seen, span, drift, held) in enumerate(table.tolist(), start=1)
            if seen
        }
