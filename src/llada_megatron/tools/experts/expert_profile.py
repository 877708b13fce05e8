"""A routing trace as a profile: JSON values, which the page, the table and the planner read."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.evaluation.expert_advice import imbalance_cost, pass_loads
from llada_megatron.llada_moe.evaluation.expert_balance import balance_of
from llada_megatron.llada_moe.evaluation.routing_statistics import block_sets, closest_pairs, coactivation
from llada_megatron.llada_moe.evaluation.routing_trace import RoutingTrace, distance, distance_by_chance
from llada_megatron.llada_moe.planning.expert_loads import SCHEMA
from llada_megatron.tools.experts.token_classes import labels

PUBLISHED_SHARE = 48 / 256
"""Experts open to a block under LLaDA2.2's block routing, of those of a layer."""
_USUAL, _SHOWN = 256, 3
"""The most frequent tokens of the text, among which each expert's own are looked for, and how many are told."""


@dataclass(frozen=True)
class ProfileArrays:
    """What is drawn beside the JSON."""

    together: list[NDArray[np.int64]]
    """By layer `[experts, experts]`: rows that chose two experts together."""


def expert_profile(
    trace: RoutingTrace, pieces: dict[int, str] | None, capacity: int | None = None
) -> tuple[dict[str, Any], ProfileArrays]:
    """Everything that the trace tells.

    Args:
        pieces: text of each token; None = not known.
        capacity: experts open to a block; None = the published share of them.
    """
    capacity = capacity or max(trace.top_k, math.ceil(PUBLISHED_SHARE * trace.experts))
    names, classes = labels(trace.tokens, trace.masked, pieces)
    loads = {
        "mask_ratio": ([f"{ratio:g}" for ratio in trace.ratios], trace.ratio),
        "token_class": (names, classes),
        "position_in_block": ([str(i) for i in range(trace.block_size)], trace.position),
        "source": (list(trace.sources), trace.source),
    }
    together = [coactivation(trace, layer) for layer in range(len(trace.layers))]
    total = trace.load()[:, 0]
    layers = {
        str(number): {
            "tokens": total[layer].tolist(),
            **asdict(balance_of(total[layer].tolist())),
            "block": asdict(block_sets(trace, layer, capacity)),
            "pairs": [asdict(pair) for pair in closest_pairs(together[layer], trace.rows)],
        }
        for layer, number in enumerate(trace.layers)
    }
    profile = {
        "schema": SCHEMA,
        "rows": trace.rows,
        "experts": trace.experts,
        "top_k": trace.top_k,
        "block_size": trace.block_size,
        "layers": layers,
        "expert_ranks": _expert_ranks(trace),
        "by": {key: _by(trace, *grouping) for key, grouping in loads.items()},
        "experts_own_tokens": None if pieces is None else _own_tokens(trace, pieces),
    }
    return profile, ProfileArrays(together)


def _expert_ranks(trace: RoutingTrace) -> dict[str, float]:
    """By number of expert-parallel ranks: rows of the busiest over the mean, in passes of one window a rank."""
    windows = int(trace.window.max()) + 1
    counts = [ranks for ranks in range(2, trace.experts + 1) if trace.experts % ranks == 0 and ranks <= windows]
    return {str(ranks): imbalance_cost(pass_loads(trace, ranks), ranks).max_over_mean for ranks in counts}


def _by(trace: RoutingTrace, names: list[str], label: NDArray[np.integer]) -> dict[str, Any]:
    """Loads by a label, groups without a row left out.

    `distance`: from each group to all rows of the layer; `chance`: what it would be if the label meant nothing.
    """
    counts = trace.load(label, len(names))
    kept = [group for group in range(len(names)) if counts[:, group].any()]
    whole = counts.sum(axis=1)
    return {
        "names": [names[group] for group in kept],
        "rows": [int((np.asarray(label) == group).sum()) for group in kept],
        "tokens": {str(number): counts[layer, kept].tolist() for layer, number in enumerate(trace.layers)},
        "distance": {
            str(number): [distance(counts[layer, group], whole[layer]) for group in kept]
            for layer, number in enumerate(trace.layers)
        },
        "chance": {
            str(number): [distance_by_chance(whole[layer], int(counts[layer, group].sum())) for group in kept]
            for layer, number in enumerate(trace.layers)
        },
    }


def _own_tokens(trace: RoutingTrace, pieces: dict[int, str]) -> dict[str, list[list[dict[str, Any]]]]:
    """By layer and expert: the visible tokens that it gets more often than other experts do.

    `lift`: how many times as often as a token of the text is chosen by a mean expert.
    """
    visible = ~trace.masked
    ids, counts = np.unique(trace.tokens[visible], return_counts=True)
    usual = np.sort(ids[np.argsort(-counts, kind="stable")[:_USUAL]])
    place = np.searchsorted(usual, trace.tokens).clip(max=len(usual) - 1)
    label = np.where(visible & (usual[place] == trace.tokens), place, -1)
    loads = trace.load(label, len(usual))
    found = {}
    for layer, number in enumerate(trace.layers):
        load = loads[layer]  # [tokens, experts]
        rate = load / np.maximum(load.sum(axis=1, keepdims=True), 1) * trace.experts
        rate[load < 5] = 0.0
        best = np.argsort(-rate, axis=0, kind="stable")[:_SHOWN]
        found[str(number)] = [
            [
                {"token": int(usual[t]), "text": pieces[int(usual[t])], "lift": float(rate[t, expert])}
                for t in best[:, expert]
                if rate[t, expert] > 1.5
            ]
            for expert in range(trace.experts)
        ]
    return found
