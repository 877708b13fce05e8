"""What a caller chooses: the checkpoint, the method, and how its draws are made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How prompts are sampled. Everything but the batch size and the layout changes what is written."""

    checkpoint: str
    tokenizer: str | None = None
    """Where the checkpoint's tokenizer is; None = where it was during training."""
    preset: str | None = None
    schedule: str | None = None
    cache: str | None = None
    editor: str | None = None
    overrides: dict[str, str] = field(default_factory=dict)
    """Keys `schedule.…`, `cache.…` and `editor.…` of the method."""
    block_length: int | None = None
    """None = the preset's, and without one a single block."""
    trained_for_editing: bool = False
    """The user's word that the model was trained to change written tokens."""
    max_new_tokens: int = 64
    """Of a continuation."""
    temperature: float = 0.0
    guidance: float = 0.0
    seed: int = 0
    batch_size: int = 8
    """Sequences that run together on one replica of the model."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "block_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value}: at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature {self.temperature}: 0 or more")
        if not math.isfinite(self.guidance):
            raise ConfigError(f"guidance {self.guidance}: a finite number")

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)
