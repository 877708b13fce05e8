"""What a routing trace tells: experts chosen together, the set of a block, changes between two models."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.evaluation.routing_trace import RoutingTrace, distance

_AT_ONCE = 4096
"""Rows whose choices are spread out at a time."""


def coactivation(trace: RoutingTrace, layer: int) -> NDArray[np.int64]:
    """Rows that chose two experts together, `[experts, experts]`; on the diagonal the rows that chose one."""
    together = np.zeros((trace.experts, trace.experts))
    for start in range(0, trace.rows, _AT_ONCE):
        chosen = trace.maps(layer, np.arange(start, min(start + _AT_ONCE, trace.rows)))
        together += chosen.T @ chosen
    return np.rint(together).astype(np.int64)


@dataclass(frozen=True)
class ExpertPair:
    """Two experts that are chosen together more often than by chance."""

    first: int
    second: int
    rows: int
    lift: float
    """How many times as often as if each were chosen by itself at its own rate."""


def closest_pairs(together: NDArray[np.int64], rows: int, count: int = 5) -> list[ExpertPair]:
    """The pairs with the highest lift among those that at least one row in a thousand chose (and five rows)."""
    alone = together.diagonal().astype(float)
    expected = np.outer(alone, alone) / max(rows, 1)
    lift = np.divide(together, expected, out=np.zeros(together.shape), where=expected > 0)
    usual = np.triu(together >= max(5, rows / 1000), k=1)
    first, second = usual.nonzero()
    order = np.argsort(-lift[first, second], kind="stable")[:count]
    return [
        ExpertPair(int(a), int(b), int(together[a, b]), float(lift[a, b]))
        for a, b in zip(first[order], second[order], strict=True)
    ]


@dataclass(frozen=True)
class BlockSets:
    """Experts that the tokens of one block touch together, over the whole blocks of one layer."""

    blocks: int
    mean: float
    largest: int
    even: float
    """The mean if every token chose at random: E (1 - (1 - k / E)^block)."""
    capacity: int
    covered: float
    """Share of the block's choices that fall on its `capacity` most chosen experts: what block routing would keep."""


def block_sets(trace: RoutingTrace, layer: int, capacity: int) -> BlockSets:
    """The sets of a layer (by index); all figures are 0 where no document fills a block."""
    rows = np.flatnonzero(trace.block >= 0)
    numbers, label = np.unique(trace.block[rows], return_inverse=True)
    even = trace.experts * (1 - (1 - trace.top_k / trace.experts) ** trace.block_size)
    if not len(numbers):
        return BlockSets(0, 0.0, 0, even, capacity, 0.0)
    flat = (label[:, None] * trace.experts + trace.choices[layer, rows]).ravel()
    counts = np.bincount(flat, minlength=len(numbers) * trace.experts).reshape(len(numbers), trace.experts)
    touched = (counts > 0).sum(axis=1)
    kept = np.sort(counts, axis=1)[:, ::-1][:, :capacity].sum()
    return BlockSets(len(numbers), float(touched.mean()), int(touched.max()), even, capacity, float(kept / len(flat)))


@dataclass(frozen=True)
class RoutingChange:
    """How the same rows are routed by two models, or by two kinds of pass, in one layer."""

    differ: float
    """Share of the rows whose set of experts is not the same."""
    experts: float
    """Mean share of a row's experts that were replaced."""
    load: float
    """Total variation between the loads."""
    differ_by_ratio: list[float]
    """`differ` at each mask ratio."""


def routing_changes(a: RoutingTrace, b: RoutingTrace) -> list[RoutingChange]:
    """The changes from trace `a` to trace `b` in each layer.

    Raises:
        ValueError: they are not of the same rows, layers and experts.
    """
    same = (a.experts, list(a.layers), a.choices.shape) == (b.experts, list(b.layers), b.choices.shape)
    if not same or not (np.array_equal(a.tokens, b.tokens) and np.array_equal(a.masked, b.masked)):
        raise ValueError("traces of other rows, layers or experts")
    loads = zip(a.load()[:, 0], b.load()[:, 0], strict=True)
    changes = []
    for layer, (before, after) in enumerate(loads):
        kept = (a.choices[layer][:, :, None] == b.choices[layer][:, None, :]).any(axis=2).sum(axis=1)
        replaced = 1.0 - kept / a.top_k
        differ = replaced > 0
        by_ratio = [float(differ[a.ratio == ratio].mean()) for ratio in range(len(a.ratios))]
        changes.append(RoutingChange(float(differ.mean()), float(replaced.mean()), distance(before, after), by_ratio))
    return changes
