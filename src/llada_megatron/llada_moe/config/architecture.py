"""The keys of a model that decide what it computes from its weights."""

from __future__ import annotations

from typing import Any

from llada_megatron.llada_moe.config.loader import to_dict
from llada_megatron.llada_moe.config.schema import ModelConfig

TRAINING_ONLY = frozenset(
    {"init_std", "moe.aux_loss_coefficient", "moe.z_loss_coefficient", "moe.expert_bias_update_rate"}
)
"""Keys that act in training alone."""


def architecture(model: ModelConfig) -> dict[str, Any]:
    """Dotted keys and values of `model`, without those that act in training alone."""
    values = to_dict(model)
    moe = values.pop("moe") or {}
    flat = values | {f"moe.{key}": value for key, value in moe.items()}
    return {key: value for key, value in flat.items() if key not in TRAINING_ONLY}
