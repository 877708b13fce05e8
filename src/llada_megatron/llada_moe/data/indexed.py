"""Megatron's `.bin`/`.idx` pair: written token run by token run, read as one flat array with document starts.

Beside it stands `.bytes`, the UTF-8 bytes of each document's text (int64): bits per byte are those of the split itself.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from numpy.typing import NDArray

from llada_megatron.llada_moe.data.set_manifest import prefix_file
from llada_megatron.llada_moe.errors import DataError

_LONGEST_DOCUMENT = 2**31 - 1
"""Tokens of the longest document: the format counts them in an int32."""


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """Type of a stored token: two bytes where they suffice (the format's own limit)."""
    return np.uint16 if vocab_size < 65500 else np.int32


class TokenWriter:
    """Writes an IndexedDataset with one sequence per document."""

    def __init__(self, prefix: Path, dtype: type[np.uint16] | type[np.int32]) -> None:
        """Open PREFIX.bin and PREFIX.bytes for writing."""
        self._prefix = prefix
        self._builder = IndexedDatasetBuilder(str(prefix_file(prefix, ".bin")), dtype=dtype)
        self._bytes = prefix_file(prefix, ".bytes").open("wb")
        self.tokens = 0
        self._last_size = 0

    @property
    def documents(self) -> int:
        """Documents written so far."""
        return len(self._builder.sequence_lengths)

    def add(self, tokens: NDArray[np.integer], lengths: list[int], sizes: list[int], continues: bool = False) -> None:
        """Append documents of these lengths, concatenated (`add_document` would cost a call and a copy for each).

        `sizes` are the UTF-8 bytes of their texts. With `continues` the first of them is the rest of the last document
        so far. Raises DataError for a document with more tokens than the format can count.
        """
        builder = self._builder
        if continues:
            self._continue_document(lengths[0], sizes[0])
            lengths, sizes = lengths[1:], sizes[1:]
        self._last_size = sizes[-1] if sizes else self._last_size
        self._bytes.write(np.array(sizes, "<i8").tobytes())
        builder.data_file.write(tokens.astype(builder.dtype, copy=False).tobytes())
        first = len(builder.sequence_lengths)
        builder.sequence_lengths.extend(lengths)
        builder.document_indices.extend(range(first + 1, first + len(lengths) + 1))
        self.tokens += len(tokens)

    def _continue_document(self, length: int, size: int) -> None:
        """Count further tokens and bytes of text to the last document."""
        lengths = self._builder.sequence_lengths
        if lengths[-1] + length > _LONGEST_DOCUMENT:
            raise DataError(f"a document of more than {_LONGEST_DOCUMENT:,} tokens: split its file into several")
        lengths[-1] += length
        self._last_size += size
        self._bytes.seek(-8, os.SEEK_END)
        self._bytes.write(np.array([self._last_size], "<i8").tobytes())

    def finish(self) -> None:
        """Close both and write PREFIX.idx."""
        self._bytes.close()
        self._builder.finalize(str(prefix_file(self._prefix, ".idx")))

    def abandon(self) -> None:
        """Close without an index."""
        self._bytes.close()
        self._builder.data_file.close()


class TokenFile:
    """A prepared set's tokens and document positions, mapped into memory (nothing is copied)."""

    def __init__(self, prefix: str | Path) -> None:
        """Open PREFIX.bin, .idx and .bytes. Raises DataError when they cannot be read or do not belong together."""
        index_path = prefix_file(prefix, ".idx")
        try:
            self._dataset = IndexedDataset(str(prefix))  # owns the mapped index
            self._index = self._dataset.index
            self.tokens: NDArray[np.integer] = np.memmap(prefix_file(prefix, ".bin"), dtype=self._index.dtype, mode="r")
            self.bytes: NDArray[np.int64] = np.memmap(prefix_file(prefix, ".bytes"), dtype="<i8", mode="r")
        except (AssertionError, ValueError, OSError, KeyError, struct.error) as error:
            raise DataError(f"{index_path}: damaged index ({error}); prepare the set again") from error
        self._item = self.tokens.dtype.itemsize
        if self.documents == 0 or sum(self.span(self.documents - 1)) != len(self.tokens):
            raise DataError(f"{index_path}: index and .bin disagree; prepare the set again")
        if len(self.bytes) != self.documents:
            raise DataError(f"{prefix_file(prefix, '.bytes')}: not of these documents; prepare the set again")

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self._index.sequence_lengths)

    def span(self, document: int) -> tuple[int, int]:
        """First token and length of a document."""
        return int(self._index.sequence_pointers[document]) // self._item, int(self._index.sequence_lengths[document])

    def spans(self, documents: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First tokens and lengths of several documents."""
        lengths = self._index.sequence_lengths[documents].astype(np.int64)
        return self._index.sequence_pointers[documents] // self._item, lengths

    def starts_within(self, begin: int, end: int) -> NDArray[np.int64]:
        """First tokens of the documents that start in [begin, end)."""
        pointers = self._index.sequence_pointers
        # bisect, because the format leaves this array unaligned and numpy's searchsorted would copy the whole of it
        low = bisect_left(pointers, begin * self._item)
        high = bisect_left(pointers, end * self._item, low, min(len(pointers), low + end - begin))
        return pointers[low:high] // self._item
