"""Configuration of dense LLaDA, under its published keys (which are those of OLMo)."""

from typing import Any, ClassVar

from transformers import PretrainedConfig

LLADA_8B: dict[str, Any] = {
    "vocab_size": 126464,
    "d_model": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "mlp_ratio": 4,
    "mlp_hidden_size": 12288,
    "max_sequence_length": 4096,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "weight_tying": False,
    "init_std": 0.02,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
    "pad_token_id": 126081,
    "use_cache": False,
}


class LLaDAConfig(PretrainedConfig):
    """Keys that are not given are those of LLaDA-8B."""

    model_type = "llada"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "initializer_range": "init_std",
    }

    def __init__(self, **keys: Any) -> None:
        """Null keys follow from others: as many key as query heads, `mlp_ratio`, a row per token."""
        keys = {**LLADA_8B, **keys}
        keys["n_kv_heads"] = keys.get("n_kv_heads") or keys["n_heads"]
        keys["mlp_hidden_size"] = keys["mlp_hidden_size"] or keys["mlp_ratio"] * keys["d_model"]
        keys["embedding_size"] = keys.get("embedding_size") or keys["vocab_size"]
        keys["tie_word_embeddings"] = keys["weight_tying"]
        super().__init__(**keys)
