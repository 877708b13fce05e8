"""The cross-entropy of a chunk of logits, by the kernel that Megatron's configuration names."""

from __future__ import annotations

import torch
from megatron.core.extensions import transformer_engine as engine
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy


def cross_entropy(
    config: ModelParallelConfig, logits: torch.Tensor, labels: torch.Tensor, group: object
) -> torch.Tensor:
    """-log p(labels), with the vocabulary sharded over the tensor ranks.

    `cross_entropy_loss_fusion` of `config` decides: off, the logits become float32 and each operation runs alone; on,
    one of the kernels that `cross_entropy_fusion_impl` names. "te" is Transformer Engine's, which reads bfloat16 logits
    and computes in float32; "native" is Megatron's own operations compiled by torch, whose gradient is bfloat16.

    Args:
        logits: `[rows, vocab / tensor_parallel]`.
        labels: `[rows]` int64.
        group: the tensor ranks.

    Returns:
        `[rows]` float32.
    """
    rows, target = logits.unsqueeze(1), labels.unsqueeze(1)
    if not config.cross_entropy_loss_fusion:
        losses = vocab_parallel_cross_entropy(rows.float(), target)
    elif config.cross_entropy_fusion_impl == "te":
        losses = engine.te_parallel_cross_entropy(rows, target, group)
    else:
        losses = fused_vocab_parallel_cross_entropy(rows, target, group)
    return losses.squeeze(1).float()
