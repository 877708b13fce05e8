"""Configuration of LLaDA2.0, 2.1 and 2.2, under its published keys."""

from typing import Any

from transformers import PretrainedConfig

LLADA2_MINI: dict[str, Any] = {
    "vocab_size": 157184,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 20,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 600000.0,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-6,
    "num_experts": 256,
    "num_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "expert_capacity": 0,
    "block_size": 32,
    "routed_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "mask_token_id": 156895,
    "eos_token_id": 156892,
    "pad_token_id": 156892,
    "use_cache": False,
}


class LLaDA2MoeConfig(PretrainedConfig):
    """Keys that are not given are those of LLaDA2.0-mini.

    `expert_capacity` (LLaDA2.2): tokens of a block of `block_size` choose among so many experts, whatever the groups.
    """

    model_type = "llada2_moe"

    def __init__(self, **keys: Any) -> None:
        """Null `head_dim`: the heads share the hidden features."""
        keys = {**LLADA2_MINI, **keys}
        keys["head_dim"] = keys.get("head_dim") or keys["hidden_size"] // keys["num_attention_heads"]
        super().__init__(**keys)
