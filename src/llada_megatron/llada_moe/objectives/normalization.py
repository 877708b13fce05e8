"""What the weighted cross-entropy is divided by, whatever the split over ranks and micro-batches.

The training step divides the sum over all sequences by `sequences * sequence_length` of the global batch, as Megatron
does. Other divisors therefore enter as one factor per sequence, which depends on counts of the whole global batch only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from llada_megatron.llada_moe.data.batch import Batch

NORMALIZATIONS = ("all_tokens", "answer_length", "masked_tokens", "conversations")


@dataclass(frozen=True)
class TokenCounts:
    """Totals of a global batch; counts of its parts add up to them."""

    sequences: int = 0
    untruncated: int = 0
    masked: int = 0
    conversations: int = 0

    def __add__(self, other: TokenCounts) -> TokenCounts:
        """Totals of two parts together."""
        return TokenCounts(
            self.sequences + other.sequences,
            self.untruncated + other.untruncated,
            self.masked + other.masked,
            self.conversations + other.conversations,
        )


def count(batch: Batch) -> TokenCounts:
    """Counts of one batch: sequences, untruncated tokens, supervised ones (the masked, if none is replaced), and
    conversations."""
    sequences = batch.inputs.shape[0]
    return TokenCounts(
        sequences=sequences,
        untruncated=int(batch.untruncated.sum()),
        masked=int((batch.weights > 0).sum()),
        conversations=sequences if batch.conversations is None else int(batch.conversations.sum()),
    )


def normalizer(kind: str, counts: TokenCounts, batch: Batch) -> Tensor:
    """Factor of each sequence [batch] float32, for the `kind` of division named in the configuration.

    With S_b = sum_i weight_bi * CE_bi, the loss is sum_b factor_b * S_b / (counts.sequences * sequence_length), that is

    * all_tokens: sum_b S_b / untruncated tokens (LLaDA pre-training: all tokens of the batch, cut-off tails excepted);
    * answer_length: mean over sequences of S_b / answer_b (LLaDA fine-tuning);
    * masked_tokens: sum_b S_b / supervised tokens (the masked ones, if none is replaced);
    * conversations: sum_b S_b / conversations, of which a sequence may hold several.

    `counts` are those of the whole global batch; `batch` may be any part of it. A zero count gives factor 0.
    """
    import torch

    size, length = batch.inputs.shape
    if kind == "all_tokens":
        return torch.full((size,), _ratio(counts.sequences * length, counts.untruncated))
    if kind == "masked_tokens":
        return torch.full((size,), _ratio(counts.sequences * length, counts.masked))
    if kind == "conversations":
        return torch.full((size,), _ratio(counts.sequences * length, counts.conversations))
    if kind == "answer_length":
        answer = batch.answer.to(torch.float32)
        return torch.where(answer > 0, length / answer.clamp(min=1), torch.zeros_like(answer))
    raise ValueError(f"unknown normalization {kind!r}; one of {', '.join(NORMALIZATIONS)}")


def _ratio(above: int, below: int) -> float:
    """above / below, and 0 where nothing is counted."""
    return above / below if below else 0.0
