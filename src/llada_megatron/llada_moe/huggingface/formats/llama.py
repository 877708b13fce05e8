"""LLaMA and models in its format: autoregressive parents of dense LLaDA. They are imported only.

Source: `LlamaConfig` and `LlamaForCausalLM` of transformers. A layer computes the same as a layer of dense LLaDA.
"""

from __future__ import annotations

from llada_megatron.llada_moe.huggingface import weights as w
from llada_megatron.llada_moe.huggingface.formats.table import NO_MASK, Field, Format, head_dim

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."

NAMES = {
    w.EMBEDDING: ("model.embed_tokens.weight",),
    w.INPUT_NORM: (_LAYER + "input_layernorm.weight",),
    w.QKV: (_ATTENTION + "q_proj.weight", _ATTENTION + "k_proj.weight", _ATTENTION + "v_proj.weight"),
    w.PROJECTION: (_ATTENTION + "o_proj.weight",),
    w.MLP_NORM: (_LAYER + "post_attention_layernorm.weight",),
    w.DENSE_UP: (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
    w.DENSE_DOWN: (_LAYER + "mlp.down_proj.weight",),
    w.FINAL_NORM: ("model.norm.weight",),
    w.OUTPUT: ("lm_head.weight",),
}
FIELDS = (
    Field("num_hidden_layers", "num_layers"),
    Field("hidden_size", "hidden_size"),
    Field("intermediate_size", "ffn_hidden_size"),
    Field("num_attention_heads", "num_attention_heads"),
    Field("num_key_value_heads", "num_key_value_heads", lambda config: config["num_attention_heads"]),
    Field("vocab_size", "vocab_size"),
    Field("max_position_embeddings", "max_sequence_length"),
    Field("mask_token_id", "mask_token_id", NO_MASK),
    Field("eos_token_id", "eos_token_id"),
    Field("rms_norm_eps", "rms_norm_eps", 1e-6),
    Field("rope_theta", "rope_theta", 10000.0),
    Field("tie_word_embeddings", "tie_embeddings", False),
)
"""The keys that Qwen3 has too."""
SCALING = "positions are rotated by theta alone here, and logits would differ at every length"
BIAS = "the projections of this model have no bias"

LLAMA = Format(
    name="llama",
    title="LLaMA (autoregressive)",
    model_type="llama",
    names=NAMES,
    fields=(*FIELDS, Field("head_dim", "head_dim", head_dim)),
    left_out={
        "eos_token_id": 2,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
    },
    accepted={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "mlp_bias": (False,),
        "rope_scaling": (None,),
        "partial_rotary_factor": (1.0,),
    },
    reasons={"attention_bias": BIAS, "mlp_bias": BIAS, "rope_scaling": SCALING},
    implied={"family": "llada", "qk_norm": False, "rotary_fraction": 1.0},
    autoregressive=True,
    why_not_exported="models of this architecture are exported as dense LLaDA",
)
