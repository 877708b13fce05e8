"""Batches of random tokens of which half are to be predicted: the same ones for every contender.

The inputs at those positions are other random tokens rather than the mask token. A step costs the same, but an
untrained router would send the equal embeddings of all masks to the same few experts: fewer and larger products, on
both sides, than a trained router causes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llada_megatron.llada_moe.config.model import ModelConfig


@dataclass(frozen=True)
class MaskedBatch:
    """Token ids `[batch, seq]` (`inputs` corrupted, `labels` not), and which positions are to be predicted (bool)."""

    inputs: torch.Tensor
    labels: torch.Tensor
    masked: torch.Tensor


def masked_batch(model: ModelConfig, sequences: int, length: int, seed: int) -> MaskedBatch:
    """Exactly half of each sequence masked, so that every repetition is the same amount of work."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(model.vocab_size, (sequences, length), generator=generator)
    masked = torch.rand(sequences, length, generator=generator).argsort(dim=1) < length // 2
    noise = torch.randint(model.vocab_size, (sequences, length), generator=generator)
    return MaskedBatch(torch.where(masked, noise, labels), labels, masked)
