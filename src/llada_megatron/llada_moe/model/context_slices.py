"""Which positions of a sequence each context rank holds.

A contiguous slice each, as long as every query sees as much as another. In `[x_t ; x_0]` a query sees the more, the
later its block is: each half is cut into twice as many pieces as there are ranks, and a rank takes one from its
beginning and one from its end, so that all ranks have the same number of keys to look at.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


class Run(NamedTuple):
    """Positions [start, stop) of a sequence."""

    start: int
    stop: int


def held_runs(positions: int, rank: int, ranks: int, doubled: bool) -> tuple[Run, ...]:
    """What a rank of several holds of a sequence, in the order of the sequence.

    Args:
        positions: of the whole sequence, a multiple of `ranks`.
        rank: from 0.
        ranks: how many hold the sequence together.
        doubled: whether it is `[x_t ; x_0]`.
    """
    if not doubled or ranks == 1 or positions % (4 * ranks):
        return (Run(positions // ranks * rank, positions // ranks * (rank + 1)),)
    half, piece = positions // 2, positions // 2 // (2 * ranks)
    pieces = (rank, 2 * ranks - 1 - rank)
    runs = [Run(at + piece * number, at + piece * (number + 1)) for at in (0, half) for number in pieces]
    return tuple(_joined(runs))


@cache
def slice_starts(positions: int, ranks: int, doubled: bool, shards: int) -> tuple[int, ...]:
    """Where the runs of all ranks begin, and those that `shards` tensor ranks hold of them under sequence parallelism;
    arguments as of `held_runs`."""
    part, starts = positions // ranks // shards, []
    for rank in range(ranks):
        held = 0
        for run in held_runs(positions, rank, ranks, doubled):
            cut = run.start + (-held) % part
            starts += [run.start, *range(cut, run.stop, part)]
            held += run.stop - run.start
    return tuple(sorted(set(starts)))


def _joined(runs: list[Run]) -> list[Run]:
    """The same with neighbours as one."""
    found = runs[:1]
    for run in runs[1:]:
        if run.start == found[-1].stop:
            found[-1] = Run(found[-1].start, run.stop)
        else:
            found.append(run)
    return found


def taken(tensor: torch.Tensor, runs: tuple[Run, ...], dim: int) -> torch.Tensor:
    """What `runs` are of the whole sequences that lie along `dim` of a tensor."""
    import torch

    parts = [tensor.narrow(dim, run.start, run.stop - run.start) for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def in_order(gathered: torch.Tensor, ranks: int, doubled: bool) -> torch.Tensor:
    """Whole sequences along dimension 0 from the parts of all ranks, one after the other.

    Parts are split and joined, never sliced, so that the gradient is written once.
    """
    import torch

    runs = [run for rank in range(ranks) for run in held_runs(gathered.size(0), rank, ranks, doubled)]
    if runs == sorted(runs):
        return gathered
    parts = gathered.split([run.stop - run.start for run in runs])
    return torch.cat([parts[number] for number in sorted(range(len(runs)), key=lambda number: runs[number])])
