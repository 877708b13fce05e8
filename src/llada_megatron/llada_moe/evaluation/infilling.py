"""How often a model puts the right token into gaps of real text, beside always naming the commonest token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_megatron.llada_moe.data.training_data import TrainingData
from llada_megatron.llada_moe.sampling import draws

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""forward(tokens [batch, seq], rows [batch, seq] bool, boundaries) -> logits [selected rows, vocab], in order of
(sequence, position)."""

MASKED_SHARE = 0.15


@dataclass(frozen=True)
class Infilling:
    """What came of filling every gap at once with the most probable token."""

    gaps: int
    right: int
    majority: int
    """Gaps whose token is the commonest of them all: what one constant guess, chosen with hindsight, gets right."""

    @property
    def accuracy(self) -> float:
        """Share of gaps filled with the right token."""
        return self.right / max(1, self.gaps)

    @property
    def majority_share(self) -> float:
        """Accuracy of the best constant guess."""
        return self.majority / max(1, self.gaps)


def choose_gaps(shape: tuple[int, int], first: int, share: float, seed: int) -> Tensor:
    """Which positions to mask: bool `[batch, seq]`, for rows numbered from `first`; the same for every model."""
    rows = torch.arange(first, first + shape[0])[:, None]
    return draws.uniform(seed, draws.GAP, rows, torch.arange(shape[1])) < share


@torch.no_grad()
def measure(
    forward: Forward,
    data: TrainingData,
    mask_id: int,
    numbers: Sequence[int],
    batch_size: int,
    share: float = MASKED_SHARE,
    seed: int = 0,
) -> Infilling:
    """Mask `share` of the tokens of held-out windows, and compare the model's most probable tokens with the real ones.

    Args:
        forward: see `Forward`.
        data: a split's windows; their own noise is not used.
        mask_id: never predicted.
        numbers: samples to take.
        batch_size: windows of one forward pass.
        share: of the tokens that become gaps.
        seed: of the gaps.
    """
    right, found = 0, []
    for start in range(0, len(numbers), batch_size):
        batch = data.batch(numbers[start : start + batch_size])
        gaps = choose_gaps((batch.labels.shape[0], batch.labels.shape[1]), start, share, seed)
        if not gaps.any():
            continue
        logits = forward(batch.labels.masked_fill(gaps, mask_id), gaps, batch.boundaries).clone()
        logits[:, mask_id] = -torch.inf
        truth = batch.labels[gaps]
        right += int((logits.argmax(-1) == truth).sum())
        found.append(truth)
    truths = torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)
    majority = int(truths.bincount().max()) if len(truths) else 0
    return Infilling(len(truths), right, majority)
