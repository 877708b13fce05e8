"""Qwen3 and Qwen3-MoE: autoregressive parents with a norm of each query and key head. They are imported only.

Source: the configuration and model classes of transformers. Their routers take the softmax over all experts, then the
best, and divide by the sum over these if `norm_topk_prob` says so (the published models do).
"""

from __future__ import annotations

from typing import Any

from llada_megatron.llada_moe.huggingface import weights as w
from llada_megatron.llada_moe.huggingface.formats import llada_moe, llama
from llada_megatron.llada_moe.huggingface.formats.table import Config, Field, Format, head_dim

_NOT_EXPORTED = "no diffusion model is published in its format, and programs that read it would run the model causally"
_NORMS = (w.QUERY_NORM, w.KEY_NORM)
_LEFT_OUT = {"max_position_embeddings": 32768, "num_attention_heads": 32, "vocab_size": 151936}
_ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "rope_scaling": (None,),
    "use_sliding_window": (False,),
}
_REASONS = {
    "attention_bias": llama.BIAS,
    "rope_scaling": llama.SCALING,
    "use_sliding_window": "every token sees the whole sequence here",
}
_MIXED = "in a model with experts the layers without them come first here"


def _score_function(config: Config) -> str:
    return "softmax_normalized" if config.get("norm_topk_prob") else "softmax"


QWEN3 = Format(
    name="qwen3",
    title="Qwen3 (dense, autoregressive)",
    model_type="qwen3",
    names={**llama.NAMES, **{norm: llada_moe.LLADA_MOE.names[norm] for norm in _NORMS}},
    fields=(*llama.FIELDS, Field("head_dim", "head_dim", 128)),
    left_out={
        **_LEFT_OUT,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
    },
    accepted=_ACCEPTED,
    reasons=_REASONS,
    implied={"family": "qwen3", "qk_norm": True, "rotary_fraction": 1.0},
    autoregressive=True,
    why_not_exported=_NOT_EXPORTED,
)
QWEN3_MOE = Format(
    name="qwen3_moe",
    title="Qwen3-MoE (autoregressive)",
    model_type="qwen3_moe",
    names=llada_moe.LLADA_MOE.names,
    fields=(
        *llama.FIELDS,
        Field("head_dim", "head_dim", head_dim),
        Field("num_experts", "moe.num_experts"),
        Field("num_experts_per_tok", "moe.top_k"),
        Field("moe_intermediate_size", "moe.expert_ffn_hidden_size"),
        Field("router_aux_loss_coef", "moe.aux_loss_coefficient", 0.0),
        Field(None, "moe.score_function", _score_function),
    ),
    left_out={
        **_LEFT_OUT,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "router_aux_loss_coef": 0.001,
    },
    accepted={**_ACCEPTED, "norm_topk_prob": (True, False), "mlp_only_layers": ([],), "decoder_sparse_step": (1,)},
    reasons={**_REASONS, "mlp_only_layers": _MIXED, "decoder_sparse_step": _MIXED},
    implied={"family": "qwen3_moe", "qk_norm": True, "rotary_fraction": 1.0, "moe.leading_dense_layers": 0},
    autoregressive=True,
    why_not_exported=_NOT_EXPORTED,
)
