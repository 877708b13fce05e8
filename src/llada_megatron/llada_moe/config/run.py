"""The configuration of a whole run, and all that cannot work in it, found before any process starts."""

from __future__ import annotations

from dataclasses import dataclass, field

from llada_megatron.llada_moe.config.data import DataConfig, check_data
from llada_megatron.llada_moe.config.intervals import CheckpointConfig, LoggingConfig, ValidationConfig, check_reporting
from llada_megatron.llada_moe.config.layout import LayoutConfig, check_layout
from llada_megatron.llada_moe.config.model import ModelConfig, check_model
from llada_megatron.llada_moe.config.objective import ObjectiveConfig, check_objective, check_routing_of_run
from llada_megatron.llada_moe.config.optimizer import OptimizerConfig, check_optimizer
from llada_megatron.llada_moe.config.parsing import Origins, collector
from llada_megatron.llada_moe.config.recovery import RecoveryConfig, check_recovery
from llada_megatron.llada_moe.config.training import TrainingConfig, check_batch


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


def validate_run(run: RunConfig, origins: Origins | None = None) -> None:
    """Refuse combinations that cannot work.

    Raises:
        ConfigError: with one line for each, at the file and line where `origins` knows it.
    """
    refuse, problems = collector(origins)
    check_model(run.model, lambda key, message: refuse(f"model.{key}", message))
    problems.raise_if_any()  # what follows divides by the model's sizes
    check_objective(run.objective, refuse)
    check_routing_of_run(run, refuse)
    check_data(run, refuse)
    check_optimizer(run.optimizer, run.training.steps, refuse)
    check_layout(run, refuse)
    check_batch(run, refuse)
    check_reporting(run, refuse)
    check_recovery(run.recovery, lambda key, message: refuse(f"recovery.{key}", message))
    problems.raise_if_any()
