"""The documents of a batch as attention needs them: cut for one context rank, made once for all layers of a batch.

Segment boundaries stay on the host. What a backend needs on the device (cumulative lengths, a block mask) is made from
them there, and copied without waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from llada_megatron.llada_moe.model.attention.doubled_documents import DoubledDocuments, pack_doubled
from llada_megatron.llada_moe.model.context_slices import Run
from llada_megatron.llada_moe.model.last_batches import LastBatches
from llada_megatron.llada_moe.model.patterns import AttentionPattern, Segment, segments
from llada_megatron.llada_moe.model.transfer import to_device

Made = TypeVar("Made")


@dataclass(frozen=True)
class DocumentPart:
    """The part of a document whose queries this context rank holds."""

    before: int
    """Positions of the document before the first of these queries."""
    queries: int
    keys: int
    """So many keys from the start of the document on are seen, by the last query at least."""


@dataclass(frozen=True)
class PackedRow:
    """One run of a sequence's positions: its queries in order, and the positions whose keys they see together."""

    first_key: int
    parts: tuple[DocumentPart, ...]

    @property
    def keys(self) -> slice:
        """Positions of the sequence: those of the parts one after another, without a gap."""
        return slice(self.first_key, self.first_key + sum(part.keys for part in self.parts))

    @property
    def queries(self) -> int:
        """How many there are."""
        return sum(part.queries for part in self.parts)


@dataclass(frozen=True)
class PackedDocuments:
    """Who sees whom in a batch, for the queries of one context rank."""

    rows: tuple[tuple[PackedRow, ...], ...]
    """Of each sequence, one for each run of positions that the rank holds of it."""
    pattern: AttentionPattern
    positions: int
    """Keys of a whole sequence."""
    _made: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, make: Callable[[PackedDocuments, torch.device], Made], device: torch.device) -> Made:
        """`make(self, device)`, made by the first layer that asks for it."""
        if (make, device) not in self._made:
            self._made[make, device] = make(self, device)
        return self._made[make, device]

    @cached_property
    def parts(self) -> list[DocumentPart]:
        """The parts of all rows, one row after the other."""
        return [part for runs in self.rows for row in runs for part in row.parts]

    @property
    def cumulative_queries(self) -> list[int]:
        """Where the queries of each part begin in the flattened `[batch * seq]`, and where the last ones end."""
        return list(accumulate((part.queries for part in self.parts), initial=0))

    @property
    def cumulative_keys(self) -> list[int]:
        """The same for the keys of the parts, taken one after another."""
        return list(accumulate((part.keys for part in self.parts), initial=0))

    @property
    def cut(self) -> bool:
        """Whether a document's queries lie on several ranks, so that some part sees more keys than it has queries."""
        return any(part.queries != part.keys for part in self.parts)

    def key_ranges(self) -> list[tuple[NDArray[np.int32], NDArray[np.int32]]]:
        """The one range of keys that each query sees: its first and the one after the last, positions in its sequence,
        `[batch, queries]`."""
        found = [[_ranges_of_row(row, self.pattern.block) for row in runs] for runs in self.rows]
        begins, ends = (np.stack([np.concatenate([row[side] for row in runs]) for runs in found]) for side in range(2))
        return [(begins, ends)]


def _ranges_of_row(row: PackedRow, block: int | None) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    begins, ends, start = [], [], row.first_key
    for part in row.parts:
        seen = np.full(part.queries, part.keys)
        if block is not None:
            own = np.arange(part.before, part.before + part.queries) // block
            seen = np.minimum(seen, (own + 1) * block)
        begins.append(np.full(part.queries, start))
        ends.append(start + seen)
        start += part.keys
    return np.concatenate(begins).astype(np.int32), np.concatenate(ends).astype(np.int32)


def pack(
    documents: Sequence[Segment], pattern: AttentionPattern, positions: int, runs: Sequence[Run]
) -> PackedDocuments:
    """Cut the segments of whole sequences for a rank that holds the queries of `runs` of each.

    Args:
        documents: all segments of all sequences, in order.
        pattern: who sees whom inside a segment.
        positions: of a whole sequence, keys and values of all of which are at hand.
        runs: positions of the rank's queries, in the order in which it holds them.
    """
    sequences: list[list[Segment]] = [[] for _ in range(documents[-1].row + 1)]
    for segment in documents:
        sequences[segment.row].append(segment)
    rows = tuple(tuple(_packed_row(sequence, pattern, run) for run in runs) for sequence in sequences)
    return PackedDocuments(rows, pattern, positions)


def _packed_row(documents: Sequence[Segment], pattern: AttentionPattern, run: Run) -> PackedRow:
    """What `run` holds of the documents of one sequence."""
    parts, first_key = [], 0
    for segment in documents:
        start, stop = max(segment.start, run.start), min(segment.stop, run.stop)
        if start >= stop:
            continue
        if not parts:
            first_key = segment.start
        keys = pattern.keys_seen(stop - segment.start, segment.stop - segment.start)
        parts.append(DocumentPart(start - segment.start, stop - start, keys))
    return PackedRow(first_key, tuple(parts))


class PackedBatches(LastBatches):
    """The packed documents of the last batches, so that all layers share what one has made."""

    def of(
        self,
        boundaries: torch.Tensor | None,
        pattern: AttentionPattern,
        *,
        batch: int,
        positions: int,
        runs: tuple[Run, ...],
    ) -> PackedDocuments | DoubledDocuments:
        """The packed documents of a batch, for the queries of `runs`; see `pack`.

        `boundaries` None = every sequence, or every half of one, is one segment.
        """

        def make() -> PackedDocuments | DoubledDocuments:
            length = positions // pattern.copies
            whole = [
                Segment(row, start, start + length) for row in range(batch) for start in range(0, positions, length)
            ]
            documents = whole if boundaries is None else segments(boundaries, positions)
            return (pack_doubled if pattern.doubled else pack)(documents, pattern, positions, runs)

        return self.once(boundaries, (pattern, batch, positions, runs), make)


def on_device(values: list[int] | NDArray[np.int32], device: torch.device) -> torch.Tensor:
    """An int32 tensor of host values, copied without waiting for the device."""
    return to_device(torch.as_tensor(values, dtype=torch.int32), device)
