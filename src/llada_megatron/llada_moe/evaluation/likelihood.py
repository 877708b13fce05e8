"""How well a model predicts held-out text, in bits per UTF-8 byte.

For a diffusion model the figure is the negative evidence lower bound: an upper bound of the text's cost,
E_t E_mask [ (1/p) sum of -log p(token) over the masked positions ], over the whole range of t (arXiv 2502.09992,
eq. 3). The batches of `TrainingData(run, "validation")` carry exactly that weight 1/p, with t stratified over
consecutive samples. For an autoregressive model it is the text's exact cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass

from torch import Tensor

from llada_megatron.llada_moe.data.batch import Batch
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
    def nats_per_token(self) -> float:
        """Mean cost of a token; NaN if there is none."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bits_per_token(self) -> float:
        """Mean cost of a token; NaN if there is none."""
        return self.nats_per_token / math.log(2)

    def bits_per_byte(self, bytes_per_token: float) -> float:
        """Mean cost of a byte of text."""
        return self.bits_per_token / bytes_per_token


@dataclass(frozen=True)
class HeldOut(Likelihood):
    """What a validation gives: the cost of its samples."""

    drafted: Likelihood | None = None
    """Of a model that is trained to predict a text from left to right, which the cost is that of, and in blocks: the
    upper bound of the second."""


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
