"""The configuration of a whole run: its sections."""

from __future__ import annotations

from dataclasses import dataclass, field

from llada_megatron.llada_moe.config.data import DataConfig
from llada_megatron.llada_moe.config.intervals import CheckpointConfig, LoggingConfig, ValidationConfig
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.config.optimizer import OptimizerConfig
from llada_megatron.llada_moe.config.recovery import RecoveryConfig
from llada_megatron.llada_moe.config.training import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `model` is a mapping, or the name of a file in configs/models (or its path); `recovery` the same
    with configs/recovery."""

    model: ModelConfig
    training: TrainingConfig
    data: DataConfig
    optimizer: OptimizerConfig
    output_dir: str
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
