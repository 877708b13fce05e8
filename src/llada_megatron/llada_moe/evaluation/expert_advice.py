"""What measured loads cost, and what would have evened them out: simulations on a routing trace."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.evaluation.expert_placement import rank_loads
from llada_megatron.llada_moe.evaluation.routing_trace import RoutingTrace

FACTORS = (1.0, 1.25, 1.5, 2.0)
"""Capacity factors for which dropped tokens are counted."""


def pass_loads(trace: RoutingTrace, together: int, seed: int = 0) -> NDArray[np.int64]:
    """Tokens per expert of passes in which the windows of `together` ranks meet: `[layers, passes, experts]`.

    Windows of all mask ratios are mixed, as a training step mixes them. What does not fill a pass is left out.
    """
    windows = int(trace.window.max()) + 1
    by_window = trace.load(trace.window, windows)
    order = np.random.default_rng(seed).permutation(windows)[: windows // together * together]
    return by_window[:, order].reshape(len(trace.layers), -1, together, trace.experts).sum(axis=2)


@dataclass(frozen=True)
class ImbalanceCost:
    """What uneven ranks cost under expert parallelism of a size, over all passes and layers."""

    ranks: int
    max_over_mean: float
    """Rows of the busiest rank of each pass and layer over the mean, the sums compared."""
    lost: float
    """Share of the experts' time in which the mean rank waits: 1 - mean / max."""


def imbalance_cost(passes: NDArray[np.int64], ranks: int, orders: list[list[int]] | None = None) -> ImbalanceCost:
    """The cost from loads of passes `[layers, passes, experts]`; `orders`: the placement of each layer."""
    busiest = mean = 0.0
    for layer, loads in enumerate(passes):
        by_rank = rank_loads(loads, ranks, None if orders is None else orders[layer])
        busiest += by_rank.max(axis=-1).sum()
        mean += by_rank.mean(axis=-1).sum()
    return ImbalanceCost(ranks, busiest / mean if mean else 1.0, 1.0 - mean / busiest if busiest else 0.0)


def dropped_shares(passes: NDArray[np.int64]) -> dict[float, float]:
    """Share of the tokens' choices that a capacity factor would drop: what an expert gets in a pass beyond the factor
    times the mean of the layer. `passes` `[layers, passes, experts]`."""
    mean, total = passes.mean(axis=-1, keepdims=True), max(int(passes.sum()), 1)
    return {factor: float(np.maximum(passes - factor * mean, 0.0).sum() / total) for factor in FACTORS}


def factor_without_drops(passes: NDArray[np.int64]) -> float:
    """The smallest capacity factor at which no pass of any layer drops a token."""
    mean = passes.mean(axis=-1)
    return float(np.divide(passes.max(axis=-1), mean, out=np.ones(mean.shape), where=mean > 0).max())


@dataclass(frozen=True)
class BalancingBias:
    """A bias that evens out one layer, found by the update that Megatron makes after each step."""

    bias: NDArray[np.float32]
    """`[experts]`, added to the scores that the routing was measured with."""
    updates: int
    before: float
    """Busiest expert over the mean, without it, on tokens that it was not fitted on."""
    after: float
    """The same with it."""


def balancing_bias(
    scores: NDArray[np.float32],
    held_out: NDArray[np.float32],
    top_k: int,
    rate: float,
    most: int = 1000,
    goal: float = 1.1,
) -> BalancingBias:
    """Updates b += step * sign(mean load - load) on the same tokens until the busiest expert has `goal` times the mean
    (arXiv 2408.15664; Megatron's `moe_router_bias_update_rate`), with steps that fall from `rate` to 0, so that loads
    settle. Of the biases on the way, that which evens out the held-out tokens best is returned.

    Args:
        scores: `[rows, experts]` by which the router chooses the `top_k` largest, without groups of experts.
        held_out: the same of other tokens.
        most: updates after which it ends.
    """
    bias = np.zeros(scores.shape[1], np.float32)
    before = _uneven(_load(held_out, top_k))
    best = BalancingBias(bias.copy(), 0, before, before)
    for updates in range(most + 1):
        load = _load(scores + bias, top_k)
        after = _uneven(_load(held_out + bias, top_k))
        if after < best.after:
            best = BalancingBias(bias.copy(), updates, before, after)
        if _uneven(load) <= goal:
            break
        bias += np.float32(rate * (1 - updates / most)) * np.sign(load.mean() - load).astype(np.float32)
    return best


def _load(scores: NDArray[np.float32], top_k: int) -> NDArray[np.int64]:
    """Tokens of each expert, `[experts]`."""
    chosen = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
    return np.bincount(chosen.ravel(), minlength=scores.shape[1])


def _uneven(load: NDArray[np.int64]) -> float:
    return float(load.max() / load.mean())
