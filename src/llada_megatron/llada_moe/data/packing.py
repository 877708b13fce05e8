"""Documents packed into windows: the token stream of one split of one set, cut every `sequence_length` tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.data.indexed import TokenFile
from llada_megatron.llada_moe.data.permutation import mix_all, permute
from llada_megatron.llada_moe.errors import DataError

Split = Literal["train", "validation"]
_HASH_BLOCK = 1 << 20
"""Documents hashed at a time when the held-out ones are looked up."""


def held_out(first: int, last: int, fraction: float) -> NDArray[np.int64]:
    """Numbers of the documents in [first, last) that belong to validation.

    A function of the document's number alone: neither the run's seed nor documents added later move one to the other
    split.
    """
    numbers = np.arange(first, last, dtype=np.uint64)
    return numbers[(mix_all(numbers) >> np.uint64(11)) * 2.0**-53 < fraction].astype(np.int64)


class PackedDataset:
    """Windows of `sequence_length` tokens over the split's documents in corpus order, without an incomplete last one.

    Memory grows with the held-out documents only; a window costs a binary search and one copy.
    """

    def __init__(
        self,
        prefix: str | Path,
        sequence_length: int,
        split: Split,
        validation_fraction: float,
        seed: int,
        isolate_documents: bool,
    ) -> None:
        """Open a prepared set. Raises DataError when the split does not fill one window."""
        self._file = TokenFile(prefix)
        self._length, self._seed, self._isolate = sequence_length, seed, isolate_documents
        self._split: Split = split
        blocks = [held_out(a, min(a + _HASH_BLOCK, self._file.documents), validation_fraction) for a in
                  range(0, self._file.documents, _HASH_BLOCK)]  # fmt: skip
        held = np.concatenate(blocks)
        self.documents = len(held) if split == "validation" else self._file.documents - len(held)
        held_bytes = int(self._file.bytes[held].sum())
        self.bytes = held_bytes if split == "validation" else int(self._file.bytes.sum()) - held_bytes
        self._begins, lengths = self._spans(held)
        self._offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.tokens = int(self._offsets[-1])
        self.windows = self.tokens // sequence_length
        if self.windows == 0:
            raise DataError(self._too_short(prefix, validation_fraction))

    def _spans(self, held: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Runs of the split's tokens in the file (first tokens, lengths): held-out documents, or the gaps between."""
        begins, lengths = self._file.spans(held)
        if self._split == "validation":
            return begins, lengths
        gap_begins = np.concatenate([[0], begins + lengths])
        gap_lengths = np.concatenate([begins, [len(self._file.tokens)]]) - gap_begins
        return gap_begins[gap_lengths > 0], gap_lengths[gap_lengths > 0]

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of the split's text per token, end-of-text tokens counted as tokens."""
        return self.bytes / self.tokens

    def window(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Tokens [seq] of window `index` and its boundaries [segments + 1], ascending from 0 to seq.

        With isolated documents each boundary inside is a document's start; otherwise the window is one segment.
        """
        if not 0 <= index < self.windows:
            raise IndexError(f"window {index} of {self.windows}")
        start, stop = index * self._length, (index + 1) * self._length
        first = int(np.searchsorted(self._offsets, start, side="right")) - 1
        tokens = np.empty(self._length, np.int64)
        cuts: list[NDArray[np.int64]] = []
        filled = 0
        while filled < self._length:
            begin = int(self._begins[first]) + start + filled - int(self._offsets[first])
            end = begin + min(int(self._offsets[first + 1]), stop) - start - filled
            tokens[filled : filled + end - begin] = self._file.tokens[begin:end]
            if self._isolate:
                cuts.append(self._file.starts_within(begin, end) - begin + filled)
            filled, first = filled + end - begin, first + 1
        inside = np.concatenate(cuts) if cuts else np.empty(0, np.int64)
        return tokens, np.concatenate([[0], inside[inside > 0], [self._length]]).astype(np.int32)

    def order(self, epoch: int, place: int, set_number: int = 0) -> int:
        """The window at `place` of an epoch, in an order drawn from (seed, set, epoch) and computed without a table."""
        return permute(place, self.windows, (self._seed, set_number, self._split == "validation", epoch))

    def _too_short(self, prefix: str | Path, fraction: float) -> str:
        """Why there is no window, with the numbers."""
        part = fraction if self._split == "validation" else 1 - fraction
        advice = "prepare more text, shorten training.sequence_length, or "
        advice += "raise" if self._split == "validation" else "lower"
        return (
            f"{prefix}: the {self._split} part ({part:g} of {self._file.documents} documents) "
            f"holds {self.documents}, {self.tokens} tokens; one window takes {self._length}: "
            f"{advice} data.validation_fraction"
        )
