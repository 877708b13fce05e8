"""Windows and noise put together into what a training step reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llada_megatron.llada_moe.diffusion.noise import Corruption, ReplacementVocabulary


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
    live: Tensor
    """[batch] int64: tokens that count under `all_tokens`: all but a cut-off tail; autoregressive: those supervised."""
    answer: Tensor
    """[batch] int64: length of the answer; all live tokens for plain text."""


@dataclass(frozen=True)
class Row:
    """One sequence of a batch."""

    inputs: NDArray[np.int64]
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    boundaries: NDArray[np.int32]
    mask_ratio: float
    live: int


def diffusion_row(
    tokens: NDArray[np.int64],
    boundaries: NDArray[np.int32],
    noise: Corruption,
    mask_id: int,
    words: ReplacementVocabulary | None = None,
) -> Row:
    """A masked sequence [seq]: its own tokens are the labels (no shift), weighted 1/p where masked.

    A cut makes the tail a segment of its own, which nothing live attends to. Where the noise replaces tokens, by some
    of `words`, all others that are live are weighted 1, also those shown as they are: a model that is only ever asked
    about wrong tokens would learn that what it sees is wrong.
    """
    inputs = np.where(noise.mask, mask_id, tokens)
    weights = noise.mask * np.float32(1.0 / noise.ratio if noise.ratio > 0 else 0.0)
    if noise.replacement is not None:
        if words is None:
            raise ValueError("noise that replaces tokens needs the words to replace them by")
        inputs = np.where(noise.replacement.replaced, words.other(tokens, noise.replacement.choice), inputs)
        weights[: noise.length] = np.where(noise.mask, weights, np.float32(1.0))[: noise.length]
    if noise.length < len(tokens) and noise.length not in boundaries:
        boundaries = np.sort(np.append(boundaries, np.int32(noise.length)))
    return Row(inputs, tokens, weights, boundaries, noise.ratio, noise.length)


def autoregressive_row(tokens: NDArray[np.int64], boundaries: NDArray[np.int32]) -> Row:
    """A sequence [seq] whose labels are the next tokens; the last position of each segment has none."""
    labels = np.append(tokens[1:], tokens[-1])
    weights = np.ones(len(tokens), np.float32)
    weights[boundaries[1:] - 1] = 0.0
    return Row(tokens, labels, weights, boundaries, 1.0, int(np.count_nonzero(weights)))


def collate(rows: Sequence[Row]) -> Batch:
    """Stack rows of equal length into a batch."""
    length = len(rows[0].inputs)
    boundaries = np.concatenate([[0], *(row.boundaries[1:] + i * length for i, row in enumerate(rows))]).astype(
        np.int32
    )
    live = torch.tensor([row.live for row in rows], dtype=torch.int64)
    return Batch(
        inputs=torch.from_numpy(np.stack([row.inputs for row in rows])),
        labels=torch.from_numpy(np.stack([row.labels for row in rows])),
        weights=torch.from_numpy(np.stack([row.weights for row in rows])),
        boundaries=torch.from_numpy(boundaries),
        mask_ratio=torch.tensor([row.mask_ratio for row in rows], dtype=torch.float32),
        live=live,
        answer=live.clone(),
    )
