"""Sums of a few numbers on the host, over many ranks with few connections.

Model tensors travel over NCCL where there are GPUs. Counts, flags and the like are on the host, and stay there: moved
to a GPU, each would wait for all that the GPU has still to do. Gloo reduces them, but it connects every pair of a
group: 511 sockets on each of 512 ranks. Here the ranks form a tree of gloo groups of at most `BRANCH`: the first rank
of each group takes part for it in a group of the next level, and hands down what comes out. Every rank gets the bits
that the root has.
"""

from __future__ import annotations

import datetime
import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from torch import distributed as dist

BRANCH = 16
"""The most ranks in a gloo group: 31 connections on rank 0 at 512 ranks, and three levels."""

TIME_LIMIT_S = 600.0
"""A collective that takes longer fails: a rank is gone or hangs."""


class _Level(NamedTuple):
    """One gloo group of this rank."""

    group: Any
    first: int
    """Its first rank, which takes part in the next level for it."""


class HostGroup:
    """Ranks that reduce tensors on the host. One thread at a time may use it, in the same order on all ranks."""

    def __init__(self, partition: Iterable[Sequence[int]]) -> None:
        """Connect this rank with its part (collective over the world).

        Args:
            partition: ranks of the world in parts, alike on all ranks.
        """
        self._levels: list[_Level] = []
        self._handed_down = False
        limit, rank = datetime.timedelta(seconds=TIME_LIMIT_S), dist.get_rank()
        for ranks in partition:
            for members in groups_of_tree(ranks):
                group = dist.new_group(members, timeout=limit, backend="gloo")
                if rank in members:
                    self._levels.append(_Level(group, members[0]))
                    self._handed_down = len(ranks) > BRANCH

    def all_reduce(self, tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> None:
        """Reduce a tensor on the host in place; it is equal on all ranks of the part, bit for bit (collective)."""
        for level in self._levels:
            dist.all_reduce(tensor, op, group=level.group)
        if self._handed_down:
            for level in reversed(self._levels):
                dist.broadcast(tensor, src=level.first, group=level.group)


def groups_of_tree(ranks: Sequence[int]) -> list[list[int]]:
    """The groups of two to `BRANCH` ranks in the tree over `ranks`, the lowest level first."""
    groups: list[list[int]] = []
    while len(ranks) > 1:
        level = [list(ranks[start : start + BRANCH]) for start in range(0, len(ranks), BRANCH)]
        groups += [members for members in level if len(members) > 1]
        ranks = [members[0] for members in level]
    return groups


def world() -> HostGroup:
    """All ranks (collective over the world at its first call)."""
    return _over_world(dist.group.WORLD)


def data_parallel() -> HostGroup:
    """The data-parallel ranks of this rank: those that hold the same part of the model and read other samples, each
    context rank among its own (collective over the world at its first call, which `topology.initialize` makes).
    """
    return _over_data(parallel_state.get_data_parallel_group())


@functools.lru_cache(maxsize=1)
def _over_world(group: Any) -> HostGroup:
    return HostGroup([range(group.size())])


@functools.lru_cache(maxsize=1)
def _over_data(group: Any) -> HostGroup:
    ranks = dist.get_world_size()
    if group.size() == ranks:
        return world()
    stage = ranks // parallel_state.get_pipeline_model_parallel_world_size()  # stages are the slowest axis of the ranks
    copy = stage // group.size()  # tensor and context ranks are the fastest
    return HostGroup(
        range(start + place, start + stage, copy) for start in range(0, ranks, stage) for place in range(copy)
    )
