"""Which experts share a rank: an order of the experts under which equal parts of them get about equal loads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def rank_loads(load: NDArray[np.integer], ranks: int, order: Sequence[int] | None = None) -> NDArray[np.int64]:
    """Tokens of each rank, `[..., ranks]`, from those of each expert `[..., experts]`; rank r holds the r-th part.

    `order`: the expert at each place; None = as they are numbered.
    """
    placed = load if order is None else load[..., list(order)]
    return placed.reshape(*placed.shape[:-1], ranks, -1).sum(axis=-1)


def balanced_order(load: NDArray[np.integer], ranks: int, groups: int = 1) -> list[int]:
    """The expert at each place so that the busiest rank has few tokens: the largest first to the emptiest rank with
    room (Graham 1969), then exchanges between the busiest rank and others as long as one helps. Where that is no better
    than the experts as they are numbered, they stay.

    Args:
        load: `[experts]`.
        ranks: divides the experts.
        groups: of group-limited routing. A group stays together, so that the router's groups keep their meaning:
            whole groups are dealt out, or the experts of each group over its own ranks.

    Raises:
        ValueError: the ranks divide neither experts nor groups evenly.
    """
    experts = len(load)
    if experts % ranks or experts % groups or (groups > 1 and groups % ranks and ranks % groups):
        raise ValueError(f"{experts} experts in {groups} groups cannot be dealt out over {ranks} ranks")
    order = _order(load, ranks, groups)
    better = rank_loads(load, ranks, order).max() < rank_loads(load, ranks).max()
    return order if better else list(range(experts))


def _order(load: NDArray[np.integer], ranks: int, groups: int) -> list[int]:
    experts = len(load)
    if groups == 1:
        return _dealt(list(range(experts)), load, ranks)
    size = experts // groups
    members = [list(range(first, first + size)) for first in range(0, experts, size)]
    if groups % ranks == 0:
        order = _dealt(list(range(groups)), np.array([load[each].sum() for each in members]), ranks)
        return [expert for group in order for expert in members[group]]
    return [expert for each in members for expert in _dealt(each, load, ranks // groups)]


def _dealt(things: list[int], load: NDArray[np.integer], ranks: int) -> list[int]:
    """`things`, of which `load[thing]` is known, in `ranks` equally long parts."""
    room = len(things) // ranks
    parts: list[list[int]] = [[] for _ in range(ranks)]
    for thing in sorted(things, key=lambda each: (-load[each], each)):
        free = [part for part in parts if len(part) < room]
        min(free, key=lambda part: sum(load[each] for each in part)).append(thing)
    while _exchange(parts, load):
        pass
    return [thing for part in parts for thing in sorted(part)]


def _exchange(parts: list[list[int]], load: NDArray[np.integer]) -> bool:
    """Exchange two things so that the busier of two ranks, one of them the busiest, loses most; False = none helps."""
    sums = [sum(int(load[each]) for each in part) for part in parts]
    busiest = max(range(len(parts)), key=lambda rank: sums[rank])
    best, gain = None, 0
    for rank, part in enumerate(parts):
        gap = sums[busiest] - sums[rank]
        if rank == busiest or gap <= 0:
            continue
        for i, mine in enumerate(parts[busiest]):
            for j, other in enumerate(part):
                moved = int(load[mine]) - int(load[other])
                if 0 < moved < gap and min(moved, gap - moved) > gain:
                    best, gain = (rank, i, j), min(moved, gap - moved)
    if best is None:
        return False
    rank, i, j = best
    parts[busiest][i], parts[rank][j] = parts[rank][j], parts[busiest][i]
    return True
