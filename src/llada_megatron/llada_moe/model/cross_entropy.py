"""The cross-entropy of a chunk of logits, by the kernel that Megatron's configuration names."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions import transformer_engine as engine
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from llada_megatron.llada_moe.model.compiled import for_any_rows


def cross_entropy(
    config: ModelParallelConfig, logits: torch.Tensor, labels: torch.Tensor, group: object
) -> torch.Tensor:
    """-log p(labels), with the vocabulary sharded over the tensor ranks.

    `cross_entropy_loss_fusion` of `config` decides. Off: on a CPU the logits become float32 and each of Megatron's
    operations runs alone; on a GPU that would read and write them a dozen times, so `StreamedCrossEntropy` takes its
    place. On: one of the kernels that `cross_entropy_fusion_impl` names. "te" is Transformer Engine's, which reads
    bfloat16 logits and computes in float32 (Megatron warns of it); "native" is Megatron's own operations compiled by
    torch, whose gradient is bfloat16.

    Args:
        logits: `[rows, vocab / tensor_parallel]`.
        labels: `[rows]` int64.
        group: the tensor ranks.

    Returns:
        `[rows]` float32.
    """
    rows, target = logits.unsqueeze(1), labels.unsqueeze(1)
    if not config.cross_entropy_loss_fusion:
        if logits.is_cuda:
            return StreamedCrossEntropy.apply(logits, labels, group)
        losses = vocab_parallel_cross_entropy(rows.float(), target)
    elif config.cross_entropy_fusion_impl == "te":
        losses = engine.te_parallel_cross_entropy(rows, target, group)
    else:
        losses = fused_vocab_parallel_cross_entropy(rows, target, group)
    return losses.squeeze(1).float()


class StreamedCrossEntropy(torch.autograd.Function):
    """-log p(labels) = log sum_j exp(x_j) - x_label, with the logits read as they are and never written in float32.

    On a GPU torch compiles each of the two passes into one kernel: the forward pass reads the logits once or twice, the
    backward pass reads them once and writes their gradient in their own precision.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, group: Any) -> torch.Tensor:
        """`logits` `[rows, vocab / tensor_parallel]`, `labels` `[rows]` int64, `group` the tensor ranks: `[rows]`."""
        place = labels - group.rank() * logits.size(1)
        inside = (place >= 0) & (place < logits.size(1))
        place = place.clamp(0, logits.size(1) - 1)
        statistics = for_any_rows(_statistics, logits.device.type)
        largest, total, chosen = statistics(logits, place, inside)
        if group.size() > 1:
            everywhere = largest.clone()
            torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MAX, group=group)
            sums = torch.stack([total * (largest - everywhere).exp(), chosen])
            torch.distributed.all_reduce(sums, group=group)
            largest, (total, chosen) = everywhere, sums
        normaliser = largest + total.log()
        ctx.save_for_backward(logits, place, inside, normaliser)
        return normaliser - chosen

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """exp(x_j - normaliser) - [j is the label], times the row's gradient."""
        logits, place, inside, normaliser = ctx.saved_tensors
        derivative = for_any_rows(_derivative, logits.device.type)
        return derivative(logits, place, inside, normaliser, gradient), None, None


def _statistics(
    logits: torch.Tensor, place: torch.Tensor, inside: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row the largest logit, the sum of exp(x - largest), and the label's logit, 0 where it is elsewhere."""
    x = logits.float()
    largest = x.amax(dim=-1)
    total = (x - largest.unsqueeze(-1)).exp().sum(dim=-1)
    chosen = logits.gather(1, place.unsqueeze(-1)).squeeze(-1).float()
    return largest, total, torch.where(inside, chosen, 0.0)


def _derivative(
    logits: torch.Tensor, place: torch.Tensor, inside: torch.Tensor, normaliser: torch.Tensor, gradient: torch.Tensor
) -> torch.Tensor:
    columns = torch.arange(logits.size(1), device=logits.device)
    is_label = (columns == place.unsqueeze(-1)) & inside.unsqueeze(-1)
    p = (logits.float() - normaliser.unsqueeze(-1)).exp()
    return ((p - is_label.float()) * gradient.unsqueeze(-1)).to(logits.dtype)
