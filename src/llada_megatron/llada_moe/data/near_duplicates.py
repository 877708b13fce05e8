"""Which documents of a corpus repeat others: found before it is tokenised, so that held-out text is none of them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.data.chunk_pool import map_chunks
from llada_megatron.llada_moe.data.corpus import Chunk, Dropped, chunks, documents, text_size
from llada_megatron.llada_moe.data.formats import Reading
from llada_megatron.llada_moe.data.packing import held_out
from llada_megatron.llada_moe.data.set_manifest import NearDuplicateFacts
from llada_megatron.llada_moe.data.shingles import TABLE_LIMIT, ShingleTable, text_shingles
from llada_megatron.llada_moe.data.sources import CorpusFile

COPY_SHARE = 0.8
"""A document is a near-duplicate if at least this share of its shingles occurs in earlier documents that are none."""

REPEATED_SHARE = 0.5
"""A document is held out only if no more than this share of its shingles occurs in all other documents together."""

_BYTES_PER_SHINGLE = 4
"""Text that begins a new shingle, about (code and prose in European languages)."""

_WORTH_A_PROCESS = 32 << 20
"""Bytes of text below which new processes would take longer to start than to work."""


@dataclass(frozen=True)
class NearDuplicates:
    """The near-duplicates of a corpus. Documents are numbered from 0 in its order, empty ones left out."""

    documents: int
    """Documents of the corpus."""
    drop: bool
    """The near-duplicates are left out of the set."""
    copies: NDArray[np.int64]
    """Near-duplicates (`COPY_SHARE`), ascending."""
    copied_bytes: int
    """UTF-8 bytes of their text."""
    bytes: int
    """UTF-8 bytes of the text of all documents."""
    repeated: NDArray[np.int64]
    """Documents that share too much with others of the set to be held out (`REPEATED_SHARE`), ascending. Where the
    near-duplicates are dropped, these are numbers of what remains."""

    def copies_within(self, first: int, last: int) -> NDArray[np.int64]:
        """Near-duplicates among the documents [first, last) of the corpus, counted from `first`."""
        low, high = np.searchsorted(self.copies, [first, last])
        return self.copies[low:high] - first

    def facts(self) -> NearDuplicateFacts:
        """What the manifest of the set says of them."""
        return NearDuplicateFacts(
            documents=len(self.copies), bytes=self.copied_bytes, dropped=self.drop, never_held_out=len(self.repeated)
        )

    def described(self) -> str:
        """What was found, in a line."""
        share = self.copied_bytes / self.bytes if self.bytes else 0.0
        said = f"near-duplicates: {len(self.copies):,} of {self.documents:,} documents ({share:.1%} of the text)"
        if len(self.copies):
            said += ", dropped" if self.drop else "; --deduplicate drops them"
        return f"{said}; {len(self.repeated):,} documents repeat too much of others to be held out"


def in_training_part(found: NearDuplicates | None, document: int, fraction: float) -> bool:
    """Whether a document of the corpus is in its set and belongs to the part that is trained on.

    Args:
        found: None where the documents were not compared.
        document: its number in the corpus, from 0, empty documents left out.
        fraction: the share of the set that is held out.
    """
    repeated = np.empty(0, np.int64) if found is None else found.repeated
    if found is not None and found.drop:
        before, upto = np.searchsorted(found.copies, [document, document + 1])
        if upto > before:
            return False
        document -= int(before)
    if not held_out(document, document + 1, fraction).size:
        return True
    low, high = np.searchsorted(repeated, [document, document + 1])
    return bool(high > low)


def find_near_duplicates(
    sources: Sequence[CorpusFile], reading: Reading, workers: int, drop: bool, advance: Callable[[int], None]
) -> NearDuplicates:
    """Read the corpus and compare all documents by their shingles, in bounded memory (`shingles.TABLE_LIMIT`).

    Args:
        reading: how the sources are read.
        drop: whether the set will be without the near-duplicates.
        advance: told the bytes on disk of each chunk that was read.

    Raises:
        DataError: a source cannot be read.
    """
    size = text_size(sources)
    expected, modulus = size // _BYTES_PER_SHINGLE, 1
    while expected > modulus * TABLE_LIMIT:
        modulus *= 2
    table, sizes = ShingleTable(modulus), [np.empty(0, np.int64)]
    workers = 1 if size < _WORTH_A_PROCESS else workers
    dropped, parts = Dropped(), list[_Shingled]()
    for chunk, shingled in _all_shingles(sources, reading, workers, modulus):
        dropped.add(shingled.dropped, reading)
        advance(chunk.size)
        if not (chunk.begins and chunk.ends):
            parts.append(shingled)
            if not chunk.ends:
                continue
            shingled, parts = _joined(parts), []
        table.add(shingled.found)
        sizes.append(np.array(shingled.sizes, np.int64))
    shared, text = table.shared(), np.concatenate(sizes)
    copies = shared.copies(COPY_SHARE)
    repeated = shared.repeated(REPEATED_SHARE, without=copies if drop else copies[:0])
    if drop:
        repeated -= np.searchsorted(copies, repeated)
    return NearDuplicates(len(text), drop, copies, int(text[copies].sum()), int(text.sum()), repeated)


@dataclass
class _Shingled:
    """The documents of a chunk, or a part of one."""

    found: list[NDArray[np.uint64]]
    """The shingles of each."""
    sizes: list[int]
    """The bytes of its text."""
    dropped: Dropped = field(default_factory=Dropped)


def _joined(parts: list[_Shingled]) -> _Shingled:
    """The one document that came in parts, without the few shingles that reach from one part into the next."""
    found = np.unique(np.concatenate([found for part in parts for found in part.found]))
    return _Shingled([found], [sum(size for part in parts for size in part.sizes)])


def _all_shingles(
    sources: Sequence[CorpusFile], reading: Reading, workers: int, modulus: int
) -> Iterator[tuple[Chunk, _Shingled]]:
    """Every chunk with its documents' shingles, in order."""
    if workers > 1:
        yield from map_chunks(chunks(sources, reading), _shingle_in_worker, workers, _start_worker, (reading, modulus))
        return
    for chunk in chunks(sources, reading):
        yield chunk, _shingle(chunk, reading, modulus)


def _shingle(chunk: Chunk, reading: Reading, modulus: int) -> _Shingled:
    shingled = _Shingled([], [])
    for text in documents(chunk, reading, shingled.dropped):
        if text:
            shingled.found.append(text_shingles(text, modulus))
            shingled.sizes.append(len(text.encode("utf-8")))
    return shingled


_settings: tuple[Reading, int] | None = None
"""Set once in each worker process."""


def _start_worker(reading: Reading, modulus: int) -> None:
    """Keep the settings; Ctrl-C is the parent's to handle."""
    global _settings
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _settings = reading, modulus


def _shingle_in_worker(chunk: Chunk) -> _Shingled:
    """`_shingle` with the worker's settings."""
    assert _settings is not None
    return _shingle(chunk, *_settings)
