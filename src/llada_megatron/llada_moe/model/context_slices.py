"""Which positions of a sequence each context rank holds.

A contiguous slice each, as long as every query sees as much as another. In blocks, of one position or more, a query
sees the more, the later its block is: the sequence, or each half of `[x_t ; x_0]`, is cut into twice as many pieces as
there are ranks, and a rank takes one from its beginning and one from its end, so that all ranks have the same number of
keys to look at. Where a sequence holds several documents that is so on average; `busiest_over_mean` says how it is.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from llada_megatron.llada_moe.model.patterns import AttentionPattern

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


class Run(NamedTuple):
    """Positions [start, stop) of a sequence."""

    start: int
    stop: int


def held_runs(positions: int, rank: int, ranks: int, pattern: AttentionPattern) -> tuple[Run, ...]:
    """What a rank of several holds of a sequence, in the order of the sequence.

    Args:
        positions: of the whole sequence, a multiple of `ranks`.
        rank: from 0.
        ranks: how many hold the sequence together.
        pattern: who sees whom.
    """
    if pattern.block is None or ranks == 1 or positions % (2 * ranks * pattern.copies):
        return (Run(positions // ranks * rank, positions // ranks * (rank + 1)),)
    copy = positions // pattern.copies
    piece = copy // (2 * ranks)
    pieces = (rank, 2 * ranks - 1 - rank)
    runs = [
        Run(at + piece * number, at + piece * (number + 1)) for at in range(0, positions, copy) for number in pieces
    ]
    return tuple(_joined(runs))


@cache
def slice_starts(positions: int, ranks: int, pattern: AttentionPattern, shards: int) -> tuple[int, ...]:
    """Where the runs of all ranks begin, and those that `shards` tensor ranks hold of them under sequence parallelism;
    arguments as of `held_runs`."""
    part, starts = positions // ranks // shards, []
    for rank in range(ranks):
        held = 0
        for run in held_runs(positions, rank, ranks, pattern):
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


def in_order(gathered: torch.Tensor, ranks: int, pattern: AttentionPattern) -> torch.Tensor:
    """Whole sequences along dimension 0 from the parts of all ranks, one after the other.

    Parts are split and joined, never sliced, so that the gradient is written once.
    """
    import torch

    runs = [run for rank in range(ranks) for run in held_runs(gathered.size(0), rank, ranks, pattern)]
    if runs == sorted(runs):
        return gathered
    parts = gathered.split([run.stop - run.start for run in runs])
    return torch.cat([parts[number] for number in sorted(range(len(runs)), key=lambda number: runs[number])])


def busiest_over_mean(lengths: NDArray[np.int64], positions: int, ranks: int, pattern: AttentionPattern) -> float:
    """Work of the busiest context rank in attention, over the mean of all ranks: 1 = all have as much to do.

    Work is pairs of a query and a key that it sees, summed over sequences.

    Args:
        lengths: of the segments of whole sequences, in order `[segments]`; those of both halves of `[x_t ; x_0]`.
        positions: of a whole sequence.
        ranks: how many hold a sequence together.
        pattern: who sees whom inside a segment.
    """
    import numpy as np

    starts = np.cumsum(lengths) - lengths
    clean = starts % positions >= positions // pattern.copies
    blocks = [pattern.clean_block if of_clean else pattern.block for of_clean in clean]
    parts = zip(lengths.tolist(), blocks, strict=True)
    seen = np.concatenate([_keys_of_queries(length, block) for length, block in parts if length])
    columns = seen.reshape(-1, positions).sum(axis=0)
    held = [held_runs(positions, rank, ranks, pattern) for rank in range(ranks)]
    work = [sum(columns[run.start : run.stop].sum() for run in runs) for runs in held]
    return float(max(work) / (sum(work) / ranks))


def _keys_of_queries(length: int, block: int | None) -> NDArray[np.int64]:
    """How many keys each query of a segment sees `[length]`. One of a noisy block sees this block and the clean ones
    before it: as many as its clean twin."""
    import numpy as np

    if block is None:
        return np.full(length, length)
    return np.minimum((np.arange(length) // block + 1) * block, length)
