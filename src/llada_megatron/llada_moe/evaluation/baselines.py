"""What held-out text costs without a neural model: under token frequencies, under token pairs, and compressed by zlib.

A model's figure means little alone. All three are exact costs of the very windows that the model is measured on, and
what the first two know they have counted in the training split.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.data.packing import PackedDataset
from llada_megatron.llada_moe.evaluation.likelihood import Likelihood

Window = NDArray[np.int64]
"""Token ids `[seq]`."""

_AT_ONCE = 4096
"""Windows whose pairs are counted at a time: memory grows with the distinct pairs only, not with the text."""


@dataclass(frozen=True)
class Unigram:
    """Token frequencies: what a model knows that ignores all context."""

    probabilities: NDArray[np.float64]
    """Of each token `[vocab]`, none of them 0."""

    @classmethod
    def fit(cls, counts: NDArray[np.float64]) -> Unigram:
        """From token counts `[vocab]`, one added to each so that no token is impossible."""
        smoothed = counts.astype(np.float64) + 1.0
        return cls(smoothed / smoothed.sum())

    def measure(self, windows: Iterable[Window]) -> Likelihood:
        """The cost of some windows."""
        nats = -np.log(self.probabilities)
        return sum((Likelihood(float(nats[row].sum()), len(row), 1) for row in windows), Likelihood())


@dataclass(frozen=True)
class Bigram:
    """Pairs of neighbouring tokens, interpolated with token frequencies (Witten and Bell 1991, method C).

    P(b | a) = (count(a, b) + kinds(a) * P(b)) / (count(a) + kinds(a)), where kinds(a) is the number of different tokens
    seen after a. A window's first token has no left neighbour and costs what its frequency says.
    """

    unigram: Unigram
    pairs: NDArray[np.int64]
    """a * vocab + b of each pair seen, ascending `[pairs]`."""
    counts: NDArray[np.float64]
    """How often each was seen `[pairs]`."""

    @classmethod
    def fit(cls, unigram: Unigram, windows: Iterable[Window], weights: Iterable[float]) -> Bigram:
        """From windows of training text, each counted `weight` times."""
        pairs, counts = np.empty(0, np.int64), np.empty(0)
        codes: list[NDArray[np.int64]] = []
        shares: list[NDArray[np.float64]] = []
        for row, weight in zip(windows, weights, strict=True):
            codes.append(_codes(row, len(unigram.probabilities)))
            shares.append(np.full(len(row) - 1, weight))
            if len(codes) == _AT_ONCE:
                pairs, counts = _added(pairs, counts, codes, shares)
                codes, shares = [], []
        return cls(unigram, *_added(pairs, counts, codes, shares))

    def measure(self, windows: Iterable[Window]) -> Likelihood:
        """The cost of some windows."""
        vocab = len(self.unigram.probabilities)
        first = self.pairs // vocab
        totals, kinds = np.bincount(first, self.counts, vocab), np.bincount(first, minlength=vocab)
        return sum((self._window(row, totals, kinds) for row in windows), Likelihood())

    def _window(self, row: Window, totals: NDArray[np.float64], kinds: NDArray[np.int64]) -> Likelihood:
        before, codes = row[:-1], _codes(row, len(totals))
        at = np.searchsorted(self.pairs, codes).clip(max=len(self.pairs) - 1)
        seen = np.where(self.pairs[at] == codes, self.counts[at], 0.0)
        alone = self.unigram.probabilities[row]
        known = totals[before] + kinds[before]
        # a token that training never continued leaves the frequency of the next one
        together = np.where(known > 0, (seen + kinds[before] * alone[1:]) / np.maximum(known, 1.0), alone[1:])
        return Likelihood(-math.log(alone[0]) - float(np.log(together).sum()), len(row), 1)


def zlib_bits_per_byte(windows: Iterable[Window], decode: Callable[[list[int]], str]) -> float:
    """Bits per UTF-8 byte of the windows' text, one after another, as one stream of zlib at its highest level.

    It sees earlier windows (the last 32 KiB), which neither a model nor the other baselines do, and nothing of the
    training split.
    """
    stream, size, written = zlib.compressobj(9), 0, 0
    for row in windows:
        text = decode(row.tolist()).encode("utf-8", "replace")
        size, written = size + len(text), written + len(stream.compress(text))
    return 8 * (written + len(stream.flush())) / size if size else math.nan


def training_windows(datasets: Sequence[PackedDataset]) -> Iterable[Window]:
    """Every window of the training split."""
    return (dataset.window(i)[0] for dataset in datasets for i in range(dataset.windows))


def training_weights(datasets: Sequence[PackedDataset], shares: Sequence[float]) -> Iterable[float]:
    """How often each of `training_windows` counts, so that a blend's sets count in the shares that training draws."""
    total = sum(dataset.windows for dataset in datasets)
    return (
        share * total / dataset.windows
        for dataset, share in zip(datasets, shares, strict=True)
        for _ in range(dataset.windows)
    )


def token_counts(windows: Iterable[Window], weights: Iterable[float], vocab_size: int) -> NDArray[np.float64]:
    """How often each token occurs in some windows, each counted `weight` times `[vocab]`."""
    counts = np.zeros(vocab_size)
    for row, weight in zip(windows, weights, strict=True):
        counts += weight * np.bincount(row, minlength=vocab_size)
    return counts


def _codes(row: Window, vocab: int) -> NDArray[np.int64]:
    """One number for each pair of neighbours `[seq - 1]`."""
    return row[:-1] * vocab + row[1:]


def _added(
    pairs: NDArray[np.int64],
    counts: NDArray[np.float64],
    codes: Sequence[NDArray[np.int64]],
    weights: Sequence[NDArray[np.float64]],
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The pairs counted so far, and those of more windows."""
    merged, places = np.unique(np.concatenate([pairs, *codes]), return_inverse=True)
    return merged, np.bincount(places, np.concatenate([counts, *weights]), len(merged))
