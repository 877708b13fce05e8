"""Configuration of LLaDA-MoE, under its published keys."""

from typing import Any

from transformers import PretrainedConfig

LLADA_MOE_7B: dict[str, Any] = {
    "vocab_size": 157184,
    "hidden_size": 2048,
    "expert_intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "max_position_embeddings": 8192,
    "rope_theta": 50000.0,
    "partial_rotary_factor": 1.0,
    "rms_norm_eps": 1e-5,
    "qk_layernorm": True,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "mask_token_id": 156895,
    "eos_token_id": 156892,
    "pad_token_id": 156892,
    "use_cache": False,
}


class LLaDAConfig(PretrainedConfig):
    """Keys that are not given are those of LLaDA-MoE-7B-A1B."""

    model_type = "llada"

    def __init__(self, **keys: Any) -> None:
        """Null `num_key_value_heads`: as many as query heads."""
        keys = {**LLADA_MOE_7B, **keys}
        keys["num_key_value_heads"] = keys.get("num_key_value_heads") or keys["num_attention_heads"]
        super().__init__(**keys)
