"""Gaussian noise on the embeddings of masked tokens, for the first steps of a conversion from an autoregressive model.

Such a model has never seen the mask token, whose embedding has decayed to nearly nothing, and gradients explode where
many tokens are masked (LLaDA2.0's report). A draw is a function of the seed, the sample, the position and the feature:
every layout and every restart adds the same noise, and no generator is kept. It is made where the embeddings are, by a
hash of integers, so that the host draws nothing and waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from llada_megatron.llada_moe.data.packing import mix
from llada_megatron.llada_moe.model.context_slices import Run
from llada_megatron.llada_moe.model.transfer import to_device

if TYPE_CHECKING:
    from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding

_STREAM = 0x6D61736B  # apart from the other uses of the seed
_WORD = 1 << 64


@dataclass(frozen=True)
class MaskNoise:
    """The noise of one micro-batch."""

    std: float
    keys: torch.Tensor
    """`[batch]` int64 on the device: one for each sequence."""
    mask_id: int
    positions: torch.Tensor
    """`[seq]` int64 on the device: where in its whole sequence each token stands that this rank is given (context
    parallelism)."""

    @classmethod
    def of(
        cls, std: float, seed: int, samples: Sequence[int], mask_id: int, runs: Sequence[Run], device: torch.device
    ) -> MaskNoise:
        """Noise of the samples with these global numbers, each of which a run sees once; this rank holds `runs` of
        their positions."""
        start = mix(mix(_STREAM) ^ seed)
        keys = [_signed(mix(start ^ number)) for number in samples]
        positions = torch.cat([torch.arange(run.start, run.stop) for run in runs])
        return cls(std, to_device(torch.tensor(keys, dtype=torch.int64), device), mask_id, to_device(positions, device))

    def add(self, embedded: torch.Tensor, tokens: torch.Tensor, part: int = 0) -> torch.Tensor:
        """The embeddings, with noise on those of masked tokens.

        Args:
            embedded: `[seq / parts, batch, hidden]`, of one of `parts` equal ranges of the tokens' positions.
            tokens: ids `[batch, seq]`.
            part: which range (sequence parallelism).
        """
        rows, _, hidden = embedded.shape
        mine = slice(part * rows, (part + 1) * rows)
        masked = (tokens[:, mine] == self.mask_id).t()
        places = self.positions[mine, None] * hidden + torch.arange(hidden, device=embedded.device)
        drawn = standard_normal(places[:, None] + self.keys[:, None]) * self.std
        return embedded + (drawn * masked[:, :, None]).to(embedded.dtype)


def standard_normal(counters: torch.Tensor) -> torch.Tensor:
    """A float32 draw of N(0, 1) for each int64 counter: 48 bits of SplitMix64, and Box and Muller (1958)."""
    bits = _mixed(counters)
    radius = ((bits >> 40) & 0xFFFFFF).float().add_(0.5).mul_(2.0**-24).log_().mul_(-2.0).sqrt_()
    angle = ((bits >> 8) & 0xFFFFFF).float().mul_(2.0 * math.pi * 2.0**-24)
    return radius * angle.cos_()


def _mixed(value: torch.Tensor) -> torch.Tensor:
    """`packing.mix` of every element, as signed words."""
    value = value + _signed(0x9E3779B97F4A7C15)
    value = (value ^ _shifted(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shifted(value, 31)


def _shifted(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Right by `bits`, with zeros from the left; torch repeats the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    return word - _WORD if word >= _WORD // 2 else word


def noisy_embedding(
    embedding: LanguageModelEmbedding, noise: MaskNoise, tokens: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """What Megatron's embedding gave for `tokens` `[batch, seq]`, with noise.

    Args:
        out: `[seq, batch, hidden]`, or this tensor-parallel rank's range of the positions.
    """
    parts = tokens.size(1) // out.size(0)
    return noise.add(out, tokens, embedding.tp_group.rank() if parts > 1 else 0)
