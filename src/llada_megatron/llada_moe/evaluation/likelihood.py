"""How well a model predicts held-out text, in bits per UTF-8 byte, beside the best that token frequencies alone can do.

For a diffusion model the figure is the negative evidence lower bound: an upper bound of the text's cost,
E_t E_mask [ (1/p) sum of -log p(token) over the masked positions ], over the whole range of t (arXiv 2502.09992,
eq. 3). The batches of `TrainingData(run, "validation")` carry exactly that weight 1/p, with t stratified over
consecutive samples. For an autoregressive model it is the text's exact cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from llada_megatron.llada_moe.data.batch import Batch
from llada_megatron.llada_moe.data.packing import PackedDataset
from llada_megatron.llada_moe.data.training_data import TrainingData

SequenceLoss = Callable[[Batch], Tensor]
"""Weighted cross-entropy of each sequence of a batch `[batch]`, in nats: sum_i weights_i * -log p(labels_i)."""


@dataclass(frozen=True)
class Likelihood:
    """Cost of some text under a model. Parts add up, over batches and over ranks."""

    nats: float = 0.0
    tokens: int = 0
    sequences: int = 0

    def __add__(self, other: Likelihood) -> Likelihood:
        """Both texts together."""
        return Likelihood(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def bits_per_token(self) -> float:
        """Mean cost of a token; NaN if there is none."""
        return self.nats / self.tokens / math.log(2) if self.tokens else math.nan

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Mean cost of a byte of text."""
        return self.bits_per_token / bytes_per_token


def batches(data: TrainingData, numbers: Sequence[int], batch_size: int) -> Iterator[Batch]:
    """The samples with these numbers, in batches.

    A validation always takes the numbers from 0: the same windows under the same masks every time. Ranks share them out
    as `range(rank, sequences, ranks)` and add their `Likelihood`s.
    """
    for start in range(0, len(numbers), batch_size):
        yield data.batch(numbers[start : start + batch_size])


def of_batch(batch: Batch, losses: Tensor) -> Likelihood:
    """The cost of one batch, from the loss of each of its sequences."""
    return Likelihood(float(losses.double().sum()), int(batch.untruncated.sum()), len(losses))


def measure(loss: SequenceLoss, data: TrainingData, numbers: Sequence[int], batch_size: int) -> Likelihood:
    """The cost of the samples with these numbers under a model."""
    return sum((of_batch(batch, loss(batch)) for batch in batches(data, numbers, batch_size)), Likelihood())


@dataclass(frozen=True)
class Unigram:
    """Token frequencies: what a model knows that ignores all context."""

    nats: NDArray[np.float64]
    """Cost of each token `[vocab]`."""

    @classmethod
    def fit(cls, counts: NDArray[np.int64]) -> Unigram:
        """From token counts `[vocab]`, one added to each so that no token is impossible."""
        smoothed = counts.astype(np.float64) + 1.0
        return cls(np.log(smoothed.sum()) - np.log(smoothed))

    def measure(self, counts: NDArray[np.int64]) -> Likelihood:
        """The cost of a text with these token counts `[vocab]`."""
        return Likelihood(float((counts * self.nats).sum()), int(counts.sum()), 0)


def training_counts(datasets: Sequence[PackedDataset], shares: Sequence[float], vocab_size: int) -> NDArray[np.int64]:
    """Token counts `[vocab]` of every window of the training split; of a blend, in the shares that training draws."""
    total = np.zeros(vocab_size)
    sizes = [dataset.windows for dataset in datasets]
    for dataset, share in zip(datasets, shares, strict=True):
        counts = token_counts((dataset.window(i)[0] for i in range(dataset.windows)), vocab_size)
        total += counts * (share * sum(sizes) / dataset.windows)
    return total.round().astype(np.int64)


def token_counts(rows: Iterator[NDArray[np.int64]], vocab_size: int) -> NDArray[np.int64]:
    """How often each token occurs in some rows `[vocab]`."""
    counts = np.zeros(vocab_size, np.int64)
    for row in rows:
        counts += np.bincount(row, minlength=vocab_size)
    return counts
