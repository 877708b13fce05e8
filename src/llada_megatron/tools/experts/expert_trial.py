"""Advice on a checkpoint's experts, simulated on one half of a text and tried on the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.evaluation.expert_advice import (
    BalancingBias,
    balancing_bias,
    dropped_shares,
    factor_without_drops,
    imbalance_cost,
    pass_loads,
)
from llada_megatron.llada_moe.evaluation.expert_placement import balanced_order, rank_loads
from llada_megatron.llada_moe.evaluation.text_windows import TextWindow
from llada_megatron.parallel.evaluation.expert_change import add_bias, permute_experts
from llada_megatron.parallel.evaluation.routing_profile import routing_scores, routing_trace

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.model import MoEConfig
    from llada_megatron.llada_moe.evaluation.routing_trace import RoutingTrace
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel

SCORED_ROWS = 4096
"""Tokens on which a bias is fitted, and as many on which the fit is judged."""
RATE, UPDATES = 1e-2, 400
"""First step of the bias update in the simulation, and how many there are at most: together they reach any score."""


@dataclass(frozen=True)
class Trial:
    """A figure as it was, as the simulation expects it, and as it was measured on text that was not simulated on."""

    what: str
    before: float
    expected: float
    measured: float

    @property
    def error(self) -> float:
        """How far the measured change is from the expected level, as a share of it."""
        return abs(self.measured - self.expected) / self.expected if self.expected else 0.0

    @property
    def gain_error(self) -> float | None:
        """How far the measured gain is from the expected one, as a share of it; None where no gain was expected."""
        gain = self.before - self.expected
        return abs(self.measured - self.expected) / gain if gain > 0 else None


class ExpertTrial:
    """The two halves of a text, and what the first says."""

    def __init__(self, loaded: LoadedModel, windows: Sequence[TextWindow], ratios: Sequence[float]) -> None:
        """Raises ConfigError: there are fewer than two windows."""
        if len(windows) < 2:
            raise ConfigError(
                f"--tokens: advice is fitted on one half of the windows and tried on the other, and there is only "
                f"{len(windows)}; ask for more tokens"
            )
        self.loaded, self.ratios = loaded, ratios
        self.moe: MoEConfig = loaded.run.model.moe  # type: ignore[assignment]
        self._fit, self._proof = list(windows[0::2]), list(windows[1::2])
        self.fitted = self._trace(self._fit, seed=0)

    def _trace(self, windows: Sequence[TextWindow], seed: int) -> RoutingTrace:
        only = [replace(window, source=0) for window in windows]
        return routing_trace(self.loaded, only, self.ratios, ["text"], block_size=32, seed=seed)

    def measure(self) -> RoutingTrace:
        """The second half through the model as it is now."""
        return self._trace(self._proof, seed=1)

    def orders(self, ranks: int) -> list[list[int]]:
        """The placement of each layer for so many ranks. Raises ConfigError: there is none."""
        try:
            return [balanced_order(load, ranks, self.moe.num_expert_groups) for load in self.fitted.load()[:, 0]]
        except ValueError as error:
            raise ConfigError(f"{error}: expert ranks that divide the experts, and the groups or by them") from None

    def costs(self, ranks: Sequence[int]) -> list[dict[str, Any]]:
        """For each number of ranks what imbalance costs as the experts lie, and under a better placement."""
        rows = []
        for count in ranks:
            passes = pass_loads(self.fitted, count)
            if not passes.shape[1]:
                raise ConfigError(
                    f"--advise {count}: {count} ranks need {count} windows at a time, and a half of the text has "
                    f"{len(self._fit) * len(self.ratios)}; ask for more tokens"
                )
            orders = self.orders(count)
            now, placed = imbalance_cost(passes, count), imbalance_cost(passes, count, orders)
            rows.append({"ranks": count, "now": asdict(now), "placed": asdict(placed)})
        return rows

    def capacity(self) -> dict[str, Any]:
        """Capacity factors and what they would drop, in passes of one window."""
        passes = pass_loads(self.fitted, 1)
        return {"without_drops": factor_without_drops(passes), "dropped": dropped_shares(passes)}

    def try_placement(self, ranks: int) -> tuple[Trial, dict[int, list[int]]]:
        """Move the experts, and compare the busiest rank's tokens: over its layers, relative to the mean rank."""
        orders = self.orders(ranks)
        load = self.fitted.load()[:, 0]
        before = _busiest(self.measure().load()[:, 0], ranks)
        expected = _busiest(np.stack([row[order] for row, order in zip(load, orders, strict=True)]), ranks)
        by_layer = dict(zip(self.fitted.layers, orders, strict=True))
        permute_experts(self.loaded.model, by_layer)
        measured = _busiest(self.measure().load()[:, 0], ranks)
        return Trial(f"busiest of {ranks} ranks / mean", before, expected, measured), by_layer

    def try_bias(self) -> tuple[Trial, dict[int, BalancingBias]]:
        """Add the bias that evens out each layer of the first half, and compare the worst layer's busiest expert.

        Raises:
            ConfigError: the model's routers have no bias, or choose among groups.
        """
        if not self.moe.expert_bias:
            raise ConfigError(
                "--try bias: the model's routers have no expert bias (moe.expert_bias); its balance is trained with "
                "moe.aux_loss_coefficient"
            )
        if len(self._fit) < 2:
            raise ConfigError("--try bias: needs four windows of text; ask for more --tokens, or a smaller --length")
        if self.moe.num_expert_groups > 1 or self.moe.expert_capacity:
            raise ConfigError("--try bias: simulated for routers that choose among all experts, not groups or blocks")
        before = _uneven(self.measure().load()[:, 0])
        found = self._balanced_layers()
        expected = float(np.mean([each.after for each in found.values()]))
        measured = _uneven(self.measure().load()[:, 0])
        return Trial("busiest expert / mean, mean of the layers", before, expected, measured), found

    def _balanced_layers(self) -> dict[int, BalancingBias]:
        """Biases, added layer by layer from below: what a layer's router sees depends on the experts before it."""
        found = {}
        for index, layer in enumerate(self.fitted.layers):
            scores, held_out = (
                routing_scores(self.loaded, windows, self.ratios, SCORED_ROWS)[index]
                for windows in (self._fit[0::2], self._fit[1::2])
            )
            found[layer] = balancing_bias(scores, held_out, self.fitted.top_k, RATE, UPDATES)
            add_bias(self.loaded.model, {layer: found[layer].bias})
        return found


def _busiest(load: NDArray[np.integer], ranks: int) -> float:
    """Tokens of the busiest rank of each layer over the mean rank's, the sums over layers compared."""
    by_rank = rank_loads(load, ranks)
    return float(by_rank.max(axis=1).sum() / by_rank.mean(axis=1).sum())


def _uneven(load: NDArray[np.integer]) -> float:
    """Mean over the layers of the busiest expert's tokens over the mean."""
    return float((load.max(axis=1) / load.mean(axis=1)).mean())
