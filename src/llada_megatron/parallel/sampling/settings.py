"""The settings of sampling: the checkpoint, the method, and the random draws."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.errors import ConfigError

GraphUse = Literal["auto", "always", "never"]
"""Whether passes are captured as CUDA graphs: where they can be; or it is an error where they cannot; or not at all."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How prompts are sampled. All settings but the batch size, CUDA graphs and the layout change the results."""

    checkpoint: str
    tokenizer: str | None = None
    """Where the checkpoint's tokenizer is; None = where it was during training."""
    preset: str | None = None
    """Name of a published method; the next three replace parts of it."""
    schedule: str | None = None
    cache: str | None = None
    editor: str | None = None
    overrides: dict[str, str] = field(default_factory=dict)
    """Settings of the method, with keys such as `schedule.threshold`."""
    block_length: int | None = None
    """Positions of a block; None = that of the preset, and without a preset one single block."""
    trained_for_editing: bool = False
    """The user states that the model was trained to change sampled tokens, whatever its configuration says."""
    max_new_tokens: int = 64
    """New tokens of a continuation."""
    temperature: float = 0.0
    guidance: float = 0.0
    seed: int = 0
    """Seed of the random draws."""
    batch_size: int = 8
    """Sequences that run together on one replica of the model."""
    cuda_graphs: GraphUse = "auto"
    fp8: str | None = None
    """The recipe of FP8 in which the layers keep their weights and compute; None = in the precision of the run."""
    layout: LayoutConfig = field(default_factory=LayoutConfig)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "block_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} {value}: at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature {self.temperature}: 0 or more")
        if self.cuda_graphs not in get_args(GraphUse):
            raise ConfigError(f"cuda_graphs {self.cuda_graphs}: one of {', '.join(get_args(GraphUse))}")
        if not math.isfinite(self.guidance):
            raise ConfigError(f"guidance {self.guidance}: a finite number")

    def to_json(self) -> dict[str, Any]:
        """The settings as plain values."""
        return asdict(self)
