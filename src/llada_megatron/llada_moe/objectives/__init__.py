"""What a model learns: one objective a file. Each file of this folder is imported when a kind is first looked up."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.config.parsing import VARIANTS
from llada_megatron.llada_moe.objectives.interface import REGISTERED, Objective

__all__ = ["Objective", "make_objective", "objective_kinds"]


def objective_kinds() -> list[str]:
    """Every value that `objective.kind` can have."""
    _import_all()
    return sorted(REGISTERED)


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a configuration names. Raises KeyError for an unknown kind, which validation refuses."""
    _import_all()
    return REGISTERED[config.kind](config)


@functools.cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def _config_class(values: dict[str, str]) -> type[ObjectiveConfig]:
    """The class with the keys of the kind among `values`; the common one for an unknown kind."""
    _import_all()
    objective = REGISTERED.get(values.get("kind", ObjectiveConfig.kind))
    return ObjectiveConfig if objective is None else objective.config_class


VARIANTS[ObjectiveConfig] = _config_class
