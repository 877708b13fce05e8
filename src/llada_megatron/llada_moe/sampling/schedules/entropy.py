"""Commits by how much entropy their predictions have together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from llada_megatron.llada_moe.sampling.schedules.base import Stateless, best, comparable, require_at_least
from llada_megatron.llada_moe.sampling.statistics import Need, Statistics
from llada_megatron.llada_moe.sampling.view import View


@dataclass(frozen=True)
class EntropyBound(Stateless):
    """Commit the longest run of best predictions whose entropies, without the largest, sum to at most gamma.

    The EB-Sampler (arXiv 2505.24857): this sum bounds what the predictions can say of each other. With gamma 0 one
    position is committed in a step, without a bound all of them.
    """

    gamma: float = 0.1
    """Nats."""
    order: Literal["entropy", "confidence"] = "entropy"
    """What makes a prediction a good one: low entropy, or high confidence."""
    needs = frozenset[Need]({"entropy"})

    def __post_init__(self) -> None:
        """Raises: ConfigError: a bound below 0."""
        require_at_least("gamma", self.gamma, 0)

    def select(self, statistics: Statistics, view: View) -> Tensor:
        """See `Running`."""
        entropy = statistics.entropy
        assert entropy is not None
        priority = -entropy if self.order == "entropy" else statistics.confidence
        ranked = comparable(priority, view.masked).argsort(dim=1, descending=True, stable=True)
        sums = entropy.double().nan_to_num(nan=1e30).gather(1, ranked)
        within = (sums.cumsum(1) - sums.cummax(1).values) <= self.gamma
        return best(priority, view.masked, within.long().cumprod(1).sum(1).clamp(min=1))
