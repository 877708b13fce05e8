"""Which documents of a corpus repeat others: found before it is tokenised, so that held-out text is none of them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.data.chunk_pool import map_chunks
from llada_megatron.llada_moe.data.corpus import Chunk, CorpusFile, chunks, documents, text_size
from llada_megatron.llada_moe.data.packing import held_out
from llada_megatron.llada_moe.data.set_manifest import NearDuplicateFacts
from llada_megatron.llada_moe.data.shingles import TABLE_LIMIT, ShingleTable, text_shingles

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
    sources: Sequence[CorpusFile], key: str, workers: int, drop: bool, advance: Callable[[int], None]
) -> NearDuplicates:
    """Read the corpus and compare all documents by their shingles, in bounded memory (`shingles.TABLE_LIMIT`).

    Args:
        key: the key of the text in JSON lines.
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
    for chunk, (found, bytes_of_each) in _all_shingles(sources, key, workers, modulus):
        table.add(found)
        sizes.append(np.array(bytes_of_each, np.int64))
        advance(chunk.size)
    shared, text = table.shared(), np.concatenate(sizes)
    copies = shared.copies(COPY_SHARE)
    repeated = shared.repeated(REPEATED_SHARE, without=copies if drop else copies[:0])
    if drop:
        repeated -= np.searchsorted(copies, repeated)
    return NearDuplicates(len(text), drop, copies, int(text[copies].sum()), int(text.sum()), repeated)


_Shingled = tuple[list[NDArray[np.uint64]], list[int]]
"""The shingles of each document of a chunk, and the bytes of its text."""


def _all_shingles(
    sources: Sequence[CorpusFile], key: str, workers: int, modulus: int
) -> Iterator[tuple[Chunk, _Shingled]]:
    """Every chunk with its documents' shingles, in order."""
    if workers > 1:
        yield from map_chunks(chunks(sources), _shingle_in_worker, workers, _start_worker, (key, modulus))
        return
    for chunk in chunks(sources):
        yield chunk, _shingle(chunk, key, modulus)


def _shingle(chunk: Chunk, key: str, modulus: int) -> _Shingled:
    found, sizes = [], []
    for text in documents(chunk, key, []):
        if text:
            found.append(text_shingles(text, modulus))
            sizes.append(len(text.encode("utf-8")))
    return found, sizes


_settings: tuple[str, int] | None = None
"""Set once in each worker process."""


def _start_worker(key: str, modulus: int) -> None:
    """Keep the settings; Ctrl-C is the parent's to handle."""
    global _settings
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _settings = key, modulus


def _shingle_in_worker(chunk: Chunk) -> _Shingled:
    """`_shingle` with the worker's settings."""
    assert _settings is not None
    return _shingle(chunk, *_settings)
