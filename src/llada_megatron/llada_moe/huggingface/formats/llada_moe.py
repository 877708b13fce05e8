"""LLaDA-MoE: inclusionAI/LLaDA-MoE-7B-A1B-Base and -Instruct.

Source: the modelling files that dInfer and dllm carry. The mask token is not in the published configuration; the
published samplers use 156895. The router takes the softmax over all experts before the choice and does not
renormalise; `router_num_group` and `router_topk_group` have no effect.
"""

from __future__ import annotations

from llada_megatron.llada_moe.huggingface import weights as w
from llada_megatron.llada_moe.huggingface.formats.table import Export, Field, Format, head_dim

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "self_attn."
_EXPERT = _LAYER + "mlp.experts.{expert}."

LLADA_MOE = Format(
    name="llada_moe",
    title="LLaDA-MoE (LLaDA-MoE-7B-A1B)",
    model_type="llada",
    marker="num_experts",
    names={
        w.EMBEDDING: ("model.embed_tokens.weight",),
        w.INPUT_NORM: (_LAYER + "input_layernorm.weight",),
        w.QKV: (_ATTENTION + "q_proj.weight", _ATTENTION + "k_proj.weight", _ATTENTION + "v_proj.weight"),
        w.QUERY_NORM: (_ATTENTION + "q_norm.weight",),
        w.KEY_NORM: (_ATTENTION + "k_norm.weight",),
        w.PROJECTION: (_ATTENTION + "o_proj.weight",),
        w.MLP_NORM: (_LAYER + "post_attention_layernorm.weight",),
        w.ROUTER: (_LAYER + "mlp.gate.weight",),
        w.EXPERT_UP: (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
        w.EXPERT_DOWN: (_EXPERT + "down_proj.weight",),
        w.FINAL_NORM: ("model.norm.weight",),
        w.OUTPUT: ("lm_head.weight",),
    },
    fields=(
        Field("num_hidden_layers", "num_layers"),
        Field("hidden_size", "hidden_size"),
        Field("dense_intermediate_size", "ffn_hidden_size", lambda config: 4 * config["hidden_size"]),
        Field("num_attention_heads", "num_attention_heads"),
        Field("num_key_value_heads", "num_key_value_heads", lambda config: config["num_attention_heads"]),
        Field(None, "head_dim", head_dim),
        Field("vocab_size", "vocab_size"),
        Field("max_position_embeddings", "max_sequence_length"),
        Field("mask_token_id", "mask_token_id", 156895),
        Field("eos_token_id", "eos_token_id", 156892),
        Field("rms_norm_eps", "rms_norm_eps", 1e-5),
        Field("rope_theta", "rope_theta"),
        Field("partial_rotary_factor", "rotary_fraction", 1.0),
        Field("qk_layernorm", "qk_norm", True),
        Field("tie_word_embeddings", "tie_embeddings", False),
        Field("num_experts", "moe.num_experts"),
        Field("num_experts_per_tok", "moe.top_k"),
        Field("expert_intermediate_size", "moe.expert_ffn_hidden_size"),
        Field("router_aux_loss_coef", "moe.aux_loss_coefficient", 0.0),
    ),
    left_out={
        "max_position_embeddings": 4096,
        "qk_layernorm": False,
        "rms_norm_eps": 1e-5,
        "router_aux_loss_coef": 0.01,
    },
    accepted={
        "attention_bias": (False,),
        "hidden_act": ("silu",),
        "moe_router_score_function": ("softmax",),
        "moe_router_enable_expert_bias": (False,),
        "norm_topk_prob": (False,),
        "routed_scaling_factor": (1.0,),
        "shared_expert_intermediate_size": (None, 0),
        "rope_scaling": (None,),
        "clip_qkv": (None,),
    },
    implied={"family": "llada_moe", "moe.score_function": "softmax", "moe.leading_dense_layers": 0},
    exports=Export(
        folder="llada_moe",
        constants={
            "architectures": ["LLaDAMoEModelLM"],
            "auto_map": {
                "AutoConfig": "configuration_lladamoe.LLaDAConfig",
                "AutoModel": "modeling_lladamoe.LLaDAMoEModelLM",
                "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
            },
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": lambda model: model.init_std,
            "moe_layer_freq": lambda model: [1] * model.num_layers,
            "moe_router_enable_expert_bias": False,
            "moe_router_score_function": "softmax",
            "norm_topk_prob": False,
            "output_router_logits": False,
            "pad_token_id": lambda model: model.eos_token_id,
            "routed_scaling_factor": 1.0,
            "shared_expert_intermediate_size": None,
            "use_cache": False,
        },
    ),
)
