"""Which model the loads of a `profile.json` are of; `llada_moe.planning.expert_loads` reads the file."""

from __future__ import annotations

from typing import Any

from llada_megatron.llada_moe.config.model import ModelConfig

_MODEL_KEYS = ("family", "num_layers", "hidden_size", "vocab_size")
_MOE_KEYS = ("num_experts", "top_k", "expert_ffn_hidden_size", "leading_dense_layers", "score_function")


def model_identity(model: ModelConfig) -> dict[str, Any]:
    """What tells the model of a profile from others, under the names of its configuration; the model has experts."""
    own = {key: getattr(model, key) for key in _MODEL_KEYS}
    return own | {f"moe.{key}": getattr(model.moe, key) for key in _MOE_KEYS}
