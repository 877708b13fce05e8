"""What a run says of its experts at the end of an interval: scalars, a line of counts, an image."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.evaluation.expert_balance import balance_of
from llada_megatron.llada_moe.evaluation.load_colours import colours
from llada_megatron.llada_moe.evaluation.mask_ratio_bins import bin_names
from llada_megatron.parallel.expert_load import load_scalars
from llada_megatron.parallel.training.experts.rank_rows import RankWaiting
from llada_megatron.parallel.training.experts.router_watch import RouterState

IMAGE_CELL = 8
"""Pixels of a cell's side in the image."""


@dataclass(frozen=True)
class ExpertReading:
    """Everything about the experts since the last reading, over all ranks."""

    steps: int
    counts: dict[int, list[list[int]]]
    """Tokens by layer (from 1): `[mask ratio bins][experts]`."""
    routers: dict[int, RouterState]
    ranks: int
    """Expert-parallel ranks, which hold equally many consecutive experts each."""
    waiting: RankWaiting | None

    @property
    def totals(self) -> dict[int, list[int]]:
        """Tokens by layer: `[experts]`."""
        return {layer: np.array(bins).sum(axis=0).tolist() for layer, bins in self.counts.items()}

    def scalars(self, seconds_per_step: float | None) -> dict[str, float]:
        """For metrics.jsonl and TensorBoard. `seconds_per_step`: None = not known."""
        totals = self.totals
        scalars = load_scalars(totals) | self._by_ratio() | self._of_routers()
        if self.ranks > 1:
            scalars |= self._of_ranks(totals)
        if self.waiting is not None:
            lost = self.waiting.seconds_lost_per_step
            scalars |= {
                "expert_load/rank/max_over_mean": self.waiting.max_over_mean,
                "expert_load/rank/waiting_share": self.waiting.waiting_share,
                "expert_load/rank/seconds_lost_per_step": lost,
            }
            if seconds_per_step:
                scalars["expert_load/rank/step_share_lost"] = lost / seconds_per_step
        return scalars

    def _by_ratio(self) -> dict[str, float]:
        """The worst layer of each bin that had tokens."""
        scalars = {}
        for number, name in enumerate(bin_names()):
            rows = [bins[number] for bins in self.counts.values()]
            if any(map(sum, rows)):
                scalars[f"expert_load/by_mask_ratio/{name}"] = max(balance_of(row).max_over_mean for row in rows)
        return scalars

    def _of_routers(self) -> dict[str, float]:
        scalars: dict[str, float] = {}
        if self.routers:
            scalars["router/z"] = max(state.z for state in self.routers.values())
        spans = [state.bias_range for state in self.routers.values() if state.bias_range is not None]
        drifts = [state.bias_drift for state in self.routers.values() if state.bias_drift is not None]
        if spans and drifts:
            scalars |= {"router/bias_range": max(spans), "router/bias_drift": max(drifts)}
        return scalars

    def _of_ranks(self, totals: dict[int, list[int]]) -> dict[str, float]:
        """Each rank's tokens over all layers, relative to the mean rank."""
        load = np.sum([by_rank(row, self.ranks) for row in totals.values()], axis=0, dtype=float)
        mean = load.mean() or 1.0
        return {f"expert_load/rank_{rank:02d}": float(tokens / mean) for rank, tokens in enumerate(load)}

    def line(self) -> dict[str, Any]:
        """The counts themselves, for experts.jsonl."""
        return {
            "steps": self.steps,
            "mask_ratios": bin_names(),
            "tokens": {str(layer): bins for layer, bins in self.counts.items()},
            "tokens_per_rank": {str(layer): by_rank(row, self.ranks) for layer, row in self.totals.items()},
            "routers": {str(layer): _finite(asdict(state)) for layer, state in self.routers.items()},
            "waiting": None if self.waiting is None else _finite(asdict(self.waiting)),
        }

    def image(self) -> NDArray[np.uint8]:
        """Layers down, experts across, `[height, width, 3]`: white = no token, grey-blue = the mean, red = twice it."""
        rows = np.array(list(self.totals.values()), dtype=float)
        means = rows.mean(axis=1, keepdims=True)
        relative = rows / np.where(means > 0, means, 1.0)
        return colours(relative).repeat(IMAGE_CELL, axis=0).repeat(IMAGE_CELL, axis=1)


def _finite(values: dict[str, float | None]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if value is not None and math.isfinite(value) else None for name, value in values.items()}


def by_rank(row: list[int], ranks: int) -> list[int]:
    """Tokens of each rank from those of each expert."""
    return np.array(row).reshape(ranks, -1).sum(axis=1).tolist()
