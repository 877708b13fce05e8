"""What a model learns: one objective a file. Each file of this folder is imported when a kind is first looked up."""

from __future__ import annotations

import functools
import importlib
import pkgutil

from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.objectives import base
from llada_megatron.llada_moe.objectives.base import Objective

__all__ = ["Objective", "make_objective", "objective_class", "objective_kinds"]


def objective_kinds() -> list[str]:
    """Every value that `objective.kind` can have."""
    _import_all()
    return sorted(base._REGISTERED)


def objective_class(kind: str) -> type[Objective]:
    """The class of a kind. Raises KeyError: there is none."""
    _import_all()
    return base._REGISTERED[kind]


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a configuration names."""
    return objective_class(config.kind)(config)


@functools.cache
def _import_all() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
