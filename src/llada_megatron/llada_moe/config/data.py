"""What is read: the keys of `data`, and what cannot work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llada_megatron.llada_moe.config.parsing import Refuse

VALIDATION_FRACTION = 0.01
"""Share of the documents held out where a run names no other."""


@dataclass(frozen=True, kw_only=True)
class DataSetConfig:
    """One prepared set: the PREFIX that `llada prepare` wrote, and its share of the blend."""

    path: str
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is read."""

    sets: list[DataSetConfig]
    validation_fraction: float = VALIDATION_FRACTION
    """Share of the documents held out for validation."""
    isolate_documents: bool = True
    """Attention does not cross the documents packed into one window."""
    verify: Literal["start", "never"] = "start"
    """When the files of the sets are compared with the digests that `llada prepare` wrote."""


def check_data(data: DataConfig, validation_interval: int, refuse: Refuse) -> None:
    """A blend with something in it, and a validation part where one is used."""
    if not data.sets:
        refuse("data.sets", "empty; name at least one prepared set: [{path: data/PREFIX}]")
    for i, item in enumerate(data.sets):
        if item.weight <= 0:
            refuse(f"data.sets.{i}.weight", f"{item.weight} must be greater than 0; remove the set instead")
        if not item.path:
            refuse(f"data.sets.{i}.path", "empty; it is the PREFIX that `llada prepare` wrote")
        if item.path in [earlier.path for earlier in data.sets[:i]]:
            refuse(f"data.sets.{i}.path", f"{item.path} is already in the blend; add its weights together")
    if not 0 <= data.validation_fraction < 1:
        refuse("data.validation_fraction", f"{data.validation_fraction} must be at least 0 and less than 1")
    elif validation_interval > 0 and data.validation_fraction == 0:
        refuse("validation.interval", f"{validation_interval}, but data.validation_fraction 0 holds no documents out")
