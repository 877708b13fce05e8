"""The documents of sequences `[x_t ; x_0]` as attention needs them: cut for one rank, made once for all layers.

Queries are attended to in chunks of whole blocks. A chunk of a document holds its noisy queries and its clean ones;
both see all clean keys of the document before the chunk, so that only the keys of the chunk itself need a mask, which
is as large as a chunk and not as the sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from llada_megatron.llada_moe.model.context_slices import Run
from llada_megatron.llada_moe.model.patterns import AttentionPattern, Segment

CHUNK_QUERIES = 128
"""Small blocks are attended to in chunks of about this many positions; larger blocks one by one."""
Made = TypeVar("Made")


@dataclass(frozen=True)
class Held:
    """Queries [start, stop) of a document, positions from its start, in one of its halves; this rank's rows from
    `row` on."""

    row: int
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        """Rows of this rank's queries."""
        return slice(self.row, self.row + self.stop - self.start)

    def after(self, position: int) -> tuple[int, int]:
        """`start` and `stop`, counted from `position` of the document."""
        return self.start - position, self.stop - position


@dataclass(frozen=True)
class Chunk:
    """Positions [first, stop) of a document, in both halves of the sequence, and the queries that a rank holds."""

    document: int
    """Where the document begins in a half."""
    first: int
    stop: int
    noisy: tuple[Held, ...]
    clean: tuple[Held, ...]

    @property
    def held(self) -> tuple[Held, ...]:
        """The queries, noisy ones first."""
        return self.noisy + self.clean


@dataclass(frozen=True)
class DoubledDocuments:
    """Who sees whom in a batch of sequences `[x_t ; x_0]`, for the queries of one rank."""

    rows: tuple[tuple[Chunk, ...], ...]
    """The chunks of each sequence."""
    pattern: AttentionPattern
    positions: int
    """Keys of a whole sequence: those of both halves."""
    queries: int
    """This rank's of each sequence."""
    _made: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def block(self) -> int:
        """Positions of a block."""
        return self.pattern.block or self.half

    @property
    def clean_block(self) -> int:
        """Positions of a block of the clean half, among its own queries."""
        return self.pattern.clean_block or self.half

    @property
    def half(self) -> int:
        """Positions of a half."""
        return self.positions // 2

    def once(self, make: Callable[[DoubledDocuments, torch.device], Made], device: torch.device) -> Made:
        """`make(self, device)`, made by the first layer that asks for it."""
        if (make, device) not in self._made:
            self._made[make, device] = make(self, device)
        return self._made[make, device]

    def key_ranges(self) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """The two ranges of keys that each query sees, of its own noisy block (empty for a clean query) and of clean
        keys: first and the one after the last, positions in its sequence, `[batch, queries]` each."""
        block, half = self.block, self.half
        shape = (len(self.rows), self.queries)
        own, clean = (tuple(np.zeros(shape, np.int32) for _ in range(2)) for _ in range(2))
        for number, row in enumerate(self.rows):
            for chunk in row:
                start = chunk.document
                for held in chunk.noisy:
                    first, stop = _blocks(held, chunk.stop, block)
                    own[0][number, held.rows], own[1][number, held.rows] = start + first, start + stop
                    clean[0][number, held.rows], clean[1][number, held.rows] = half + start, half + start + first
                for held in chunk.clean:
                    _, stop = _blocks(held, chunk.stop, self.clean_block)
                    clean[0][number, held.rows], clean[1][number, held.rows] = half + start, half + start + stop
        return [own, clean]


def _blocks(held: Held, stop: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First position of each query's block and the one after its last, counted from the start of the document."""
    first = np.arange(held.start, held.stop) // block * block
    return first, np.minimum(first + block, stop)


def pack_doubled(
    documents: Sequence[Segment], pattern: AttentionPattern, positions: int, runs: Sequence[Run]
) -> DoubledDocuments:
    """Cut the segments of whole sequences `[x_t ; x_0]` for a rank that holds the queries of `runs`.

    Args:
        documents: all segments of both halves of all sequences, in order.
        pattern: with its blocks.
        positions: of a whole sequence, of both halves.
        runs: positions of the rank's queries in the whole sequence, in the order in which it holds them.

    Raises:
        ValueError: the halves of a sequence have different segments.
    """
    half = positions // 2
    rows = []
    for number in range(documents[-1].row + 1):
        noisy = [(one.start, one.stop) for one in documents if one.row == number and one.stop <= half]
        clean = [(one.start - half, one.stop - half) for one in documents if one.row == number and one.start >= half]
        if noisy != clean or not noisy or noisy[-1][1] != half:
            raise ValueError(f"sequence {number}: the noisy half and the clean half have different segments")
        rows.append(tuple(_chunks(noisy, pattern, half, runs)))
    return DoubledDocuments(tuple(rows), pattern, positions, sum(run.stop - run.start for run in runs))


def _chunks(
    documents: list[tuple[int, int]], pattern: AttentionPattern, half: int, runs: Sequence[Run]
) -> Iterator[Chunk]:
    """The chunks with queries of a rank that holds `runs` of the sequence.

    Where the clean half has blocks of its own, its queries are in chunks of their own, which a long noisy block does
    not make longer.
    """
    block, clean_block = pattern.block or half, pattern.clean_block or half
    parts = [(block, (True, True))] if block == clean_block else [(block, (True, False)), (clean_block, (False, True))]
    for (start, stop), (size, wanted) in itertools.product(documents, parts):
        span = size * max(1, CHUNK_QUERIES // size)
        for first in range(0, stop - start, span):
            end = min(first + span, stop - start)
            noisy, clean = (
                tuple(_held(at + start, first, end, runs)) if each else ()
                for at, each in zip((0, half), wanted, strict=True)
            )
            if noisy or clean:
                yield Chunk(start, first, end, noisy, clean)


def _held(document: int, first: int, stop: int, runs: Sequence[Run]) -> Iterator[Held]:
    """What of the positions [first, stop) of a document, which begins at `document` of the sequence, lies in `runs`."""
    row = 0
    for run in runs:
        low, high = max(document + first, run.start), min(document + stop, run.stop)
        if low < high:
            yield Held(row + low - run.start, low - document, high - document)
        row += run.stop - run.start
