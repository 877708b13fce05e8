"""Runs of ten words as 64-bit numbers, and which documents share them: exact up to a size, sampled in bounded memory.

How much of a document occurs in others (its *containment*) is what makes a held-out figure too good, also where the
rest of the other document differs or the parts lie in several documents. MinHash estimates another figure, the
resemblance of two documents, and keeps a signature of each; shingles kept by their value (Broder 1997, "On the
resemblance and containment of documents", section 3: those that are 0 modulo m) estimate containment in memory that
does not grow with the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.data.packing import mix_all

LENGTH = 10
"""Words of a shingle."""

TABLE_LIMIT = 1 << 25
"""Shingles that a table keeps at most (12 bytes each, and up to four times that while they are compared)."""

_PIECE = 1 << 20
"""Characters of a text that are looked at together: a byte takes about 60 bytes of memory meanwhile."""

_SPACE, _WORD, _SIGN, _LETTER = range(4)
_POWERS = np.cumprod(np.full(256, 0x9E3779B97F4A7C15, np.uint64))
"""Odd numbers to weigh the bytes of a word and the words of a shingle with, by their place."""


def _kinds() -> NDArray[np.uint8]:
    """What each byte is in UTF-8. Letters of three bytes and more (Chinese, Thai …) are a word each."""
    kinds = np.full(256, _SIGN, np.uint8)
    kinds[: 0x20 + 1] = _SPACE
    kinds[[*b"_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"]] = _WORD
    kinds[0x80:0xE0] = _WORD
    kinds[0xE0:] = _LETTER
    return kinds


_KINDS = _kinds()


def text_shingles(text: str, modulus: int = 1) -> NDArray[np.uint64]:
    """The different shingles of a text that are 0 modulo `modulus`, ascending `[shingles]`.

    Words are runs of letters and digits, and single other characters; space only separates. A text of fewer than
    `LENGTH` words is one shingle, one without a word has none.
    """
    found, words = [], np.empty(0, np.uint64)
    for start in range(0, len(text), _PIECE):
        words = np.concatenate([words, _words(text[start : start + _PIECE])])
        if len(words) >= LENGTH:
            found.append(_kept(words, modulus))
            words = words[1 - LENGTH :]
    return np.unique(np.concatenate(found) if found else _kept(words, modulus))


def shingles(words: NDArray[np.integer], modulus: int = 1) -> NDArray[np.uint64]:
    """The different shingles of a document of these numbers (token ids, say) that are 0 modulo `modulus`, ascending."""
    return np.unique(_kept(mix_all(words.astype(np.uint64)), modulus))


def _kept(words: NDArray[np.uint64], modulus: int) -> NDArray[np.uint64]:
    """The shingles of successive words that are kept, in their order."""
    if not len(words):
        return words
    length = min(LENGTH, len(words))
    count = len(words) - length + 1
    total = np.zeros(count, np.uint64)
    for place in range(length):
        total += words[place : place + count] * _POWERS[place]
    total = mix_all(total)
    return total if modulus == 1 else total[total & np.uint64(modulus - 1) == 0]


def _words(text: str) -> NDArray[np.uint64]:
    """Each word of a text as a number."""
    data = np.frombuffer(text.encode("utf-8"), np.uint8)
    kinds = _KINDS[data]
    begins = kinds != _SPACE
    if len(data) and not text.isascii():
        inside = (data & 0xC0) == 0x80  # a character's later bytes are of its first one's kind, and begin nothing
        kinds = kinds[np.maximum.accumulate(np.where(inside, 0, np.arange(len(data))))]
        begins &= ~inside
    begins[1:] &= (kinds[1:] != _WORD) | (kinds[:-1] != _WORD)
    starts = np.flatnonzero(begins)
    if not len(starts):
        return np.empty(0, np.uint64)
    lengths = np.diff(starts, append=len(data))
    place = np.arange(starts[0], len(data)) - np.repeat(starts, lengths)
    data, kinds = data[starts[0] :], kinds[starts[0] :]
    weighed = (data.astype(np.uint64) + np.uint64(1)) * _POWERS[place & 255]
    weighed[kinds == _SPACE] = 0
    return mix_all(np.add.reduceat(weighed, starts - starts[0]))


class ShingleTable:
    """The shingles of many documents, numbered in the order in which they are added.

    When there are more than `limit`, only those that are 0 modulo twice the modulus are kept on, and so forth.
    """

    def __init__(self, modulus: int = 1, limit: int = TABLE_LIMIT) -> None:
        """`modulus`: a power of two; what is added has been kept by it."""
        self.modulus, self._limit = modulus, limit
        self._hashes: list[NDArray[np.uint64]] = []
        self._owners: list[NDArray[np.int32]] = []
        self._held = 0
        self.documents = 0

    def add(self, documents: list[NDArray[np.uint64]]) -> None:
        """Take the shingles of the next documents, each without repetition."""
        if not documents:
            return
        hashes = np.concatenate(documents)
        numbers = np.arange(self.documents, self.documents + len(documents), dtype=np.int32)
        owners = np.repeat(numbers, [len(document) for document in documents])
        self.documents += len(documents)
        self._keep(hashes, owners)
        while self._held > self._limit:
            self.modulus *= 2
            parts = list(zip(self._hashes, self._owners, strict=True))
            self._hashes, self._owners, self._held = [], [], 0
            for part in parts:
                self._keep(*part)

    def _keep(self, hashes: NDArray[np.uint64], owners: NDArray[np.int32]) -> None:
        if self.modulus > 1:
            chosen = hashes & np.uint64(self.modulus - 1) == 0
            hashes, owners = hashes[chosen], owners[chosen]
        self._hashes.append(hashes)
        self._owners.append(owners)
        self._held += len(hashes)

    def shared(self) -> SharedShingles:
        """Which shingles occur in several documents; the table is empty afterwards."""
        hashes, owners = np.concatenate([*self._hashes, []], dtype=np.uint64, casting="unsafe"), self._owners
        self._hashes, self._owners = [], []
        ordered = np.sort(hashes)
        common = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        del ordered
        owner = np.concatenate([*owners, np.empty(0, np.int32)])
        sizes = np.bincount(owner, minlength=self.documents)
        if not len(common):
            return SharedShingles(sizes, np.empty(0, np.int64), np.zeros(self.documents + 1, np.int64), 0)
        place = np.searchsorted(common, hashes)
        found = common[np.minimum(place, len(common) - 1)] == hashes
        ends = np.cumsum(np.bincount(owner[found], minlength=self.documents))
        return SharedShingles(sizes, place[found], np.concatenate([[0], ends]), len(common))


class SharedShingles:
    """The shingles that occur in several documents, document by document."""

    def __init__(
        self, sizes: NDArray[np.int64], shared: NDArray[np.int64], bounds: NDArray[np.int64], kinds: int
    ) -> None:
        """`sizes` `[documents]`: all shingles of each.

        `shared`: at [bounds[d], bounds[d + 1]) those of document d that occur in others, as numbers below `kinds`.
        """
        self._sizes, self._shared, self._bounds, self._kinds = sizes, shared, bounds, kinds

    def _of(self, document: int) -> NDArray[np.int64]:
        return self._shared[self._bounds[document] : self._bounds[document + 1]]

    def _documents(self) -> Iterator[int]:
        """Documents that share anything."""
        yield from map(int, np.flatnonzero(np.diff(self._bounds)))

    def copies(self, share: float) -> NDArray[np.int64]:
        """Documents of whose shingles at least `share` occur in earlier documents that are no copies, ascending."""
        seen = np.zeros(self._kinds, bool)
        copies = []
        for document in self._documents():
            mine = self._of(document)
            if np.count_nonzero(seen[mine]) >= share * self._sizes[document]:
                copies.append(document)
            else:
                seen[mine] = True
        return np.array(copies, np.int64)

    def repeated(self, share: float, without: NDArray[np.int64]) -> NDArray[np.int64]:
        """Documents of whose shingles more than `share` occur in others, ascending; those `without` do not count."""
        kept = np.ones(len(self._sizes), bool)
        kept[without] = False
        owner = np.repeat(np.arange(len(self._sizes)), np.diff(self._bounds))
        counts = np.bincount(self._shared[kept[owner]], minlength=self._kinds)
        common = np.bincount(owner[counts[self._shared] > 1], minlength=len(self._sizes))
        return np.flatnonzero(kept & (common > share * self._sizes)).astype(np.int64)
