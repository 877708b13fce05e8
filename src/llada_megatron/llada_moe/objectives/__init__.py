"""What a model learns: one objective a file. Each file of this folder is imported when a kind is first looked up."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING, Any

from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.config.parsing import closest
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.objectives.interface import REGISTERED, Objective

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.run import RunConfig

__all__ = [
    "Objective",
    "checkpoint_objective",
    "config_class",
    "make_objective",
    "objective_kinds",
    "trained_objective",
]


def objective_kinds() -> list[str]:
    """Every value that `objective.kind` can have."""
    _import_all()
    return sorted(REGISTERED)


def make_objective(config: ObjectiveConfig, training: TrainingConfig | None = None) -> Objective:
    """The objective that a configuration names.

    `training`: that of the run, for what an objective does at a step.

    Raises:
        ConfigError: there is no such kind, for example in a checkpoint of another version.
    """
    kinds = objective_kinds()
    if config.kind not in kinds:
        raise ConfigError(
            f"objective.kind: expected one of {', '.join(kinds)}, found {config.kind!r}{closest(config.kind, kinds)}"
        )
    objective = REGISTERED[config.kind](config)
    objective.training = training
    return objective


def checkpoint_objective(run: RunConfig, metadata: dict[str, Any]) -> Objective:
    """The objective of a run as far as one of its checkpoints has come: a run that begins with next tokens and goes on
    to masks gives checkpoints of both.

    `metadata`: what the checkpoint's manifest says.

    Raises:
        ConfigError: as `make_objective`.
    """
    objective = make_objective(run.objective, run.training)
    objective.load_state(metadata.get("objective", {}))
    return objective


def trained_objective(run: RunConfig, metadata: dict[str, Any]) -> ObjectiveConfig:
    """What one of a run's checkpoints has been trained for last (`Objective.trained_config`).

    `metadata`: what the checkpoint's manifest says; empty for a new model.
    """
    return checkpoint_objective(run, metadata).trained_config(int(metadata.get("step", 0)))


def config_class(kind: str) -> type[ObjectiveConfig]:
    """The class that holds the keys of a kind; the common one for an unknown kind, which validation refuses."""
    _import_all()
    return REGISTERED[kind].config_class if kind in REGISTERED else ObjectiveConfig


@functools.cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
