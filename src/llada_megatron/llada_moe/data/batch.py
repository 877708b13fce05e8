"""What a training step reads: rows, batches of them, and what it needs of data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llada_megatron.llada_moe.data.set_manifest import SetManifest


@dataclass
class Batch:
    """Sequences of one forward pass, on the CPU."""

    inputs: Tensor
    """[batch, seq] int64: tokens, some of them masked or replaced."""
    labels: Tensor
    """[batch, seq] int64: what each position should predict (read where weights > 0)."""
    weights: Tensor
    """[batch, seq] float32: 0 = not supervised; diffusion: 1/p where masked, and 1 elsewhere when tokens are replaced;
    autoregressive: 1 before a next token."""
    boundaries: Tensor
    """[segments + 1] int32: ascending offsets into the flattened [batch * seq] between which attention stays; 0 first,
    batch * seq last, every sequence start among them."""
    mask_ratio: Tensor
    """[batch] float32: p of each sequence; 1 for autoregressive."""
    untruncated: Tensor
    """[batch] int64: tokens that count under `all_tokens`: all but a cut-off tail; autoregressive: those supervised;
    fine-tuning: those of answers."""
    answer: Tensor
    """[batch] int64: length of the answer; all untruncated tokens for plain text."""
    conversations: Tensor | None = None
    """[batch] int64: how many a sequence holds, where several are packed into one; None = 1 in each."""
    drafted: Tensor | None = None
    """[batch, seq] bool: masks that become the model's own predictions before the step; None = there are none."""


@dataclass(frozen=True)
class Row:
    """One sequence of a batch."""

    inputs: NDArray[np.int64]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    boundaries: NDArray[np.int32]
    mask_ratio: float
    untruncated: int
    conversations: int = 1
    drafted: NDArray[np.bool_] | None = None


class Samples(Protocol):
    """What a training step and a validation need of data: the same numbers give the same batch on every rank."""

    manifests: Sequence[SetManifest]
    """The manifests of the prepared sets that the samples come from; all name one tokenizer."""

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text per token."""

    def batch(self, indices: Sequence[int]) -> Batch:
        """The samples with these global numbers, in this order."""


def collate(rows: Sequence[Row]) -> Batch:
    """Stack rows of equal length into a batch."""
    length = len(rows[0].inputs)
    boundaries = np.concatenate([[0], *(row.boundaries[1:] + i * length for i, row in enumerate(rows))]).astype(
        np.int32
    )
    untruncated = torch.tensor([row.untruncated for row in rows], dtype=torch.int64)
    return Batch(
        inputs=torch.from_numpy(np.stack([row.inputs for row in rows])),
        labels=torch.from_numpy(np.stack([row.labels for row in rows])),
        weights=torch.from_numpy(np.stack([row.weights for row in rows])),
        boundaries=torch.from_numpy(boundaries),
        mask_ratio=torch.tensor([row.mask_ratio for row in rows], dtype=torch.float32),
        untruncated=untruncated,
        answer=untruncated.clone(),
        conversations=torch.tensor([row.conversations for row in rows], dtype=torch.int64),
        drafted=_drafted(rows),
    )


def _drafted(rows: Sequence[Row]) -> Tensor | None:
    if all(row.drafted is None for row in rows):
        return None
    none = np.zeros(len(rows[0].inputs), bool)
    return torch.from_numpy(np.stack([none if row.drafted is None else row.drafted for row in rows]))
