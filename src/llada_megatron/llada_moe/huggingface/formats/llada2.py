"""LLaDA2.0, 2.1 and 2.2: inclusionAI/LLaDA2.x-mini and -flash.

Source: the published configuration and modelling file, as dFactory carries them. Query, key and value are one tensor,
all query heads above all key heads above all value heads; the expert bias is a float32 buffer. The mask token is not
in the published configuration; the published samplers use 156895. LLaDA2.2 has the same tensors and routes by blocks:
`expert_capacity` says so, and its configuration still lists groups, which its router ignores. Its
configuration names the tokens that its sampler edits with, `delete_token_id` and `split_token_id` (insert).
"""

from __future__ import annotations

from typing import Any

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.huggingface import weights as w
from llada_megatron.llada_moe.huggingface.formats.table import Config, Export, Field, Format, head_dim

_LAYER = "model.layers.{layer}."
_ATTENTION = _LAYER + "attention."
_EXPERT = _LAYER + "mlp.experts.{expert}."
_SHARED = _LAYER + "mlp.shared_experts."
_SCORING = 2

NAMES = {
    w.EMBEDDING: ("model.word_embeddings.weight",),
    w.INPUT_NORM: (_LAYER + "input_layernorm.weight",),
    w.QKV: (_ATTENTION + "query_key_value.weight",),
    w.QUERY_NORM: (_ATTENTION + "query_layernorm.weight",),
    w.KEY_NORM: (_ATTENTION + "key_layernorm.weight",),
    w.PROJECTION: (_ATTENTION + "dense.weight",),
    w.MLP_NORM: (_LAYER + "post_attention_layernorm.weight",),
    w.DENSE_UP: (_LAYER + "mlp.gate_proj.weight", _LAYER + "mlp.up_proj.weight"),
    w.DENSE_DOWN: (_LAYER + "mlp.down_proj.weight",),
    w.ROUTER: (_LAYER + "mlp.gate.weight",),
    w.EXPERT_BIAS: (_LAYER + "mlp.gate.expert_bias",),
    w.EXPERT_UP: (_EXPERT + "gate_proj.weight", _EXPERT + "up_proj.weight"),
    w.EXPERT_DOWN: (_EXPERT + "down_proj.weight",),
    w.SHARED_UP: (_SHARED + "gate_proj.weight", _SHARED + "up_proj.weight"),
    w.SHARED_DOWN: (_SHARED + "down_proj.weight",),
    w.FINAL_NORM: ("model.norm.weight",),
    w.OUTPUT: ("lm_head.weight",),
}


def shared_width(config: Config) -> int:
    """Width of the shared expert, which is as many routed experts wide as `num_shared_experts` says."""
    return (config.get("num_shared_experts") or 0) * config["moe_intermediate_size"]


def _shared_experts(model: ModelConfig) -> int:
    """The inverse of `shared_width`: how many routed experts wide the shared expert is."""
    return model.moe.shared_expert_ffn_hidden_size // model.moe.expert_ffn_hidden_size if model.moe else 0


def _void(config: Config) -> tuple[str, ...]:
    """Keys without effect: those of groups if experts are limited by block (LLaDA2.2), else those of blocks; and the
    tokens for editing of a model that does not edit."""
    by = ("n_group", "topk_group") if config.get("expert_capacity") else ("expert_capacity", "block_size")
    operations = ("delete_token_id", "split_token_id")
    return by if any(config.get(key) is not None for key in operations) else (*by, *operations)


def other_group_score(model: ModelConfig) -> str | None:
    """The published router scores a group by its two best experts, Megatron by its top_k / expert_groups_top_k best."""
    moe = model.moe
    if moe is None or moe.num_expert_groups == 1 or moe.top_k == _SCORING * moe.expert_groups_top_k:
        return None
    return (
        f"moe.top_k {moe.top_k} is not {_SCORING} x moe.expert_groups_top_k {moe.expert_groups_top_k}, as needs the "
        "published router, which scores a group of experts by its two best"
    )


FIELDS = (
    Field("num_hidden_layers", "num_layers"),
    Field("hidden_size", "hidden_size"),
    Field("intermediate_size", "ffn_hidden_size"),
    Field("num_attention_heads", "num_attention_heads"),
    Field("num_key_value_heads", "num_key_value_heads", lambda config: config["num_attention_heads"]),
    Field("head_dim", "head_dim", head_dim),
    Field("vocab_size", "vocab_size"),
    Field("max_position_embeddings", "max_sequence_length"),
    Field("mask_token_id", "mask_token_id", 156895),
    Field("eos_token_id", "eos_token_id", 156892),
    Field("delete_token_id", "delete_token_id", None),
    Field("split_token_id", "insert_token_id", None),
    Field("rms_norm_eps", "rms_norm_eps", 1e-6),
    Field("rope_theta", "rope_theta"),
    Field("partial_rotary_factor", "rotary_fraction", 1.0),
    Field("use_qk_norm", "qk_norm", True),
    Field("tie_word_embeddings", "tie_embeddings", False),
    Field("num_experts", "moe.num_experts"),
    Field("num_experts_per_tok", "moe.top_k"),
    Field("moe_intermediate_size", "moe.expert_ffn_hidden_size"),
    Field("first_k_dense_replace", "moe.leading_dense_layers", 0),
    Field("moe_router_enable_expert_bias", "moe.expert_bias", False),
    Field("n_group", "moe.num_expert_groups", 1),
    Field("topk_group", "moe.expert_groups_top_k", 1),
    Field("expert_capacity", "moe.expert_capacity", 0),
    Field("block_size", "moe.routing_block_size", 32),
    Field("routed_scaling_factor", "moe.routed_scaling_factor", 1.0),
    Field(None, "moe.shared_expert_ffn_hidden_size", shared_width),
)
ACCEPTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "score_function": ("sigmoid",),
    "norm_topk_prob": (True,),
    "norm_head": (False,),
    "norm_softmax": (False,),
    "use_bias": (False,),
    "use_qkv_bias": (False,),
    "use_rmsnorm": (True,),
    "rope_scaling": (None,),
}
LEFT_OUT: dict[str, Any] = {
    "first_k_dense_replace": 0,
    "max_position_embeddings": 16384,
    "moe_router_enable_expert_bias": True,  # no key of the class: its router always has one
    "n_group": 8,
    "num_shared_experts": 0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
    "use_bias": True,
    "use_qk_norm": True,
}
COUNTS = ("num_shared_experts",)
IMPLIED = {"family": "llada2", "moe.score_function": "sigmoid"}

LLADA2 = Format(
    name="llada2",
    title="LLaDA2 (LLaDA2.0, 2.1 and 2.2, mini and flash)",
    model_type="llada2_moe",
    other_model_types=("llada2_moe_veomni",),  # of dFactory, which trains with merged experts
    names=NAMES,
    fields=FIELDS,
    left_out=LEFT_OUT,
    accepted=ACCEPTED,
    implied=IMPLIED,
    void=_void,
    counts=COUNTS,
    block_size=32,
    obstacle=other_group_score,
    exports=Export(
        folder="llada2",
        by_threshold=True,
        constants={
            "architectures": ["LLaDA2MoeModelLM"],
            "auto_map": {
                "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
                "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
                "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
            },
            "attention_dropout": 0.0,
            "embedding_dropout": 0.0,
            "hidden_act": "silu",
            "initializer_range": lambda model: model.init_std,
            "norm_head": False,
            "norm_softmax": False,
            "norm_topk_prob": True,
            "num_shared_experts": _shared_experts,
            "output_dropout": 0.0,
            "output_router_logits": False,
            "pad_token_id": lambda model: model.eos_token_id,
            "rope_scaling": None,
            "rotary_dim": lambda model: int(model.head_dim * model.rotary_fraction),
            "router_dtype": "fp32",
            "score_function": "sigmoid",
            "use_bias": False,
            "use_cache": False,
            "use_qkv_bias": False,
        },
    ),
)
