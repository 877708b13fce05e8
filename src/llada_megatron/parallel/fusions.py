"""Which fused kernels of Megatron-Core a run uses: with Transformer Engine those that our models can, else none."""

from __future__ import annotations

from typing import Any

import torch

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.model import grouped
from llada_megatron.llada_moe.model.accelerations import transformer_engine_active


def fusion_fields(
    model: ModelConfig, training: bool, dtype: torch.dtype = torch.bfloat16, fp8: bool = False
) -> dict[str, Any]:
    """The fields of Megatron's TransformerConfig that choose kernels.

    - `gradient_accumulation_fusion`: Transformer Engine's products add weight gradients to the gradient buffer
      (`main_grad`) instead of writing a tensor that is then added. Only where a backward pass finds that buffer.
    - `bias_activation_fusion`: SwiGLU and the experts' weights in one kernel compiled by torch.
    - `apply_rope_fusion`: the rotation of queries and keys, in float32. It takes the angles as they are given, so those
      of a context rank's slice and of a pass over windows too.
    - `moe_permute_fusion`: Transformer Engine's permutation of tokens.
    - `moe_grouped_gemm`: Transformer Engine's experts, for FP8 and float32. In bfloat16 torch's grouped products
      (`model.grouped`) take their place: Transformer Engine starts a product for each expert, which keeps the host busy
      longer than the GPU (docs/gpu.md).
    - `moe_router_fusion`: scores, choice and balancing loss in one kernel. Not with block routing, whose bias differs
      from token to token, while the kernel takes one per expert.

    Off in any case: `masked_softmax_fusion`, which only Megatron's own attention reads; `persist_layer_norm`, which is
    Apex's; `bias_dropout_fusion`, which would compile a single addition, since our layers have neither.
    """
    engine = transformer_engine_active()
    fields = {
        "gradient_accumulation_fusion": engine and training,
        "bias_activation_fusion": engine,
        "apply_rope_fusion": engine,
        "masked_softmax_fusion": False,
        "persist_layer_norm": False,
        "bias_dropout_fusion": False,
    }
    if model.moe is not None:
        fields |= {
            "moe_grouped_gemm": engine and (fp8 or not grouped.serves(dtype, model.moe.expert_ffn_hidden_size)),
            "moe_permute_fusion": engine,
            "moe_router_fusion": engine and model.moe.expert_capacity == 0,
        }
    return fields
