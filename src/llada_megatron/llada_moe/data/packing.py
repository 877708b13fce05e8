"""Which tokens are sample number n: documents packed into windows, windows in a random order, sets in a blend.

All of it is a function of the number alone: no table, no position to save.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from math import gcd, lcm
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.errors import ConfigError, DataError

_WORD = (1 << 64) - 1

_ROUNDS = 6


def mix(value: int) -> int:
    """A 64-bit integer hash (the finaliser of SplitMix64: Steele, Lea, Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def mix_all(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix` of every element."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(index: int, size: int, key: tuple[int, ...]) -> int:
    """Element `index` of a permutation of range(size) chosen by `key`.

    A Feistel network over the next even number of bits, walked until it lands inside the range (Black and Rogaway 2002:
    cycle walking); four walks on average at most.
    """
    if not 0 <= index < size:
        raise IndexError(f"{index} is not in range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    state = 0
    for part in key:
        state = mix(state ^ (part & _WORD))
    keys = [mix(state + r) for r in range(_ROUNDS)]
    while True:
        left, right = index >> half, index & low
        for round_key in keys:
            left, right = right, left ^ (mix(round_key ^ right) & low)
        index = left << half | right
        if index < size:
            return index


RESOLUTION = 10_000
"""Longest cycle. Shares with a common denominator up to this are exact; others are rounded to multiples of 1/10000."""


class Blend:
    """Shares of several sets, exact over every cycle of `len(self)` samples and spread evenly inside it."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Relative weights, any positive scale. Raises ConfigError for one that cannot be met."""
        if not weights or any(not weight > 0 for weight in weights):
            raise ConfigError("data.sets: every weight must be above 0 (remove the set instead)")
        self.counts = _counts(weights)
        # The j-th of c samples of a set wants place (j + 1/2)/c of the cycle; ties go to the earlier set.
        wishes = sorted(((2 * j + 1) / (2 * c), k, j) for k, c in enumerate(self.counts) for j in range(c))
        self._sets = np.array([k for _, k, _ in wishes], np.int32)
        self._ranks = np.array([j for _, _, j in wishes], np.int64)

    def __len__(self) -> int:
        """Samples of one cycle."""
        return len(self._sets)

    def locate(self, number: int) -> tuple[int, int]:
        """Set of sample `number`, and how many samples of that set come before it."""
        cycle, place = divmod(number, len(self))
        chosen = int(self._sets[place])
        return chosen, cycle * self.counts[chosen] + int(self._ranks[place])

    @property
    def shares(self) -> list[float]:
        """The share of each set."""
        return [c / len(self) for c in self.counts]


def _counts(weights: Sequence[float]) -> list[int]:
    """Samples of each set in a cycle of at most RESOLUTION, in lowest terms."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    cycle = lcm(*(share.denominator for share in shares))
    if cycle > RESOLUTION:
        cycle = RESOLUTION
    counts = [int(share * cycle) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: (counts[k] - shares[k] * cycle, k))
    for k in by_remainder[: cycle - sum(counts)]:
        counts[k] += 1
    if 0 in counts:
        k = counts.index(0)
        raise ConfigError(
            f"data.sets[{k}].weight: {weights[k]:g} is under 1/{RESOLUTION} of the blend; raise it or remove the set"
        )
    common = gcd(*counts)
    return [c // common for c in counts]


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


def held_out_of(documents: int, fraction: float, never_held_out: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
    """Numbers of the documents of a set that belong to validation, ascending; those of `never_held_out` do not."""
    blocks = [held_out(a, min(a + _HASH_BLOCK, documents), fraction) for a in range(0, documents, _HASH_BLOCK)]
    held = np.concatenate(blocks)
    if never_held_out is None or not len(never_held_out):
        return held
    place = np.searchsorted(never_held_out, held).clip(max=len(never_held_out) - 1)
    return held[never_held_out[place] != held]


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
        never_held_out: NDArray[np.int64] | None = None,
    ) -> None:
        """Open a prepared set. Raises DataError when the split does not fill one window.

        `never_held_out`: numbers of documents that belong to training whatever their hash says, ascending.
        """
        # here, because it imports Megatron, which `llada prepare` may not before parallel.device is installed
        from llada_megatron.llada_moe.data.indexed import TokenFile

        self._file = TokenFile(prefix)
        self._length, self._seed, self._isolate = sequence_length, seed, isolate_documents
        self._split: Split = split
        self._repeats = 0 if never_held_out is None else len(never_held_out)
        self._held = held = held_out_of(self._file.documents, validation_fraction, never_held_out)
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

    def each_document(self) -> Iterator[tuple[NDArray[np.integer], int]]:
        """Tokens [length] of each document of the split with its end-of-text token, and the UTF-8 bytes of its text."""
        of_training = np.setdiff1d(np.arange(self._file.documents), self._held, assume_unique=True)
        for document in self._held if self._split == "validation" else of_training:
            first, length = self._file.span(document)
            yield self._file.tokens[first : first + length], int(self._file.bytes[document])

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
        repeats = f", {self._repeats} that repeat others left out" * (self._split == "validation" and self._repeats > 0)
        part = fraction if self._split == "validation" else 1 - fraction
        advice = "prepare more text, shorten training.sequence_length, or "
        advice += "raise" if self._split == "validation" else "lower"
        return (
            f"{prefix}: the {self._split} part ({part:g} of {self._file.documents} documents{repeats}) "
            f"holds {self.documents}, {self.tokens} tokens; one window takes {self._length}: "
            f"{advice} data.validation_fraction"
        )
