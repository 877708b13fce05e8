"""Batches of random tokens with half of the positions masked: the same ones for every contender."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llada_megatron.llada_moe.config.schema import ModelConfig


@dataclass(frozen=True)
class MaskedBatch:
    """Token ids `[batch, seq]` (`inputs` with masks, `labels` without), and where the masks are (bool)."""

    inputs: torch.Tensor
    labels: torch.Tensor
    masked: torch.Tensor

    @property
    def weights(self) -> torch.Tensor:
        """`[batch, seq]` float32: the loss is the mean over the masked positions."""
        return self.masked.float() / self.masked.sum()


def masked_batch(model: ModelConfig, sequences: int, length: int, seed: int) -> MaskedBatch:
    """Exactly half of each sequence masked, so that every repetition is the same amount of work."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(model.vocab_size, (sequences, length), generator=generator)
    masked = torch.rand(sequences, length, generator=generator).argsort(dim=1) < length // 2
    return MaskedBatch(labels.masked_fill(masked, model.mask_token_id), labels, masked)
