"""Confidence-aware training: how undecided a model is where it is right (LLaDA2.0, eq. 6).

Its gradient makes correct predictions more certain, so that a sampler that commits above a threshold commits more of
them at once. With the vocabulary sharded over tensor ranks, four numbers of a row leave a rank, never its logits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed


def entropy_where_right(logits: torch.Tensor, labels: torch.Tensor, group: Any) -> torch.Tensor:
    """Entropy of softmax(logits), in nats, of rows whose most likely token is the label; 0 of the others.

    The choice of rows has no gradient. A tie for the most likely token that the label takes part in counts as right.

    Args:
        logits: `[rows, vocab / tensor_parallel]`.
        labels: `[rows]` int64.
        group: the tensor ranks, in the order of their parts of the vocabulary.

    Returns:
        `[rows]` float32.
    """
    return _EntropyWhereRight.apply(logits, labels, group)


class _EntropyWhereRight(torch.autograd.Function):
    """With p = softmax(z): H = log Z - sum_j p_j (z_j - max), and dH/dz_j = -p_j (log p_j + H)."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: Any) -> torch.Tensor:
        size = logits.size(1)
        shifted = logits.float()
        highest = shifted.amax(dim=1)
        _reduce(highest, distributed.ReduceOp.MAX, group)
        shifted = shifted - highest[:, None]
        own = labels - group.rank() * size
        inside = (own >= 0) & (own < size)
        of_label = shifted.gather(1, own.clamp(0, size - 1)[:, None])[:, 0] * inside
        powers = shifted.exp()
        sums = torch.stack([powers.sum(dim=1), (powers * shifted).sum(dim=1), of_label])
        _reduce(sums, distributed.ReduceOp.SUM, group)
        total, weighted, of_label = sums
        entropy = total.log() - weighted / total
        right = of_label == 0
        ctx.save_for_backward(powers / total[:, None], shifted - total.log()[:, None], entropy, right)
        ctx.dtype = logits.dtype
        return entropy * right

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:  # type: ignore[override]
        chances, logs, entropy, right = ctx.saved_tensors
        found = -chances * (logs + entropy[:, None]) * (gradient * right)[:, None]
        return found.to(ctx.dtype), None, None


def _reduce(values: torch.Tensor, operation: Any, group: Any) -> None:
    if group.size() > 1:
        distributed.all_reduce(values, op=operation, group=group)
