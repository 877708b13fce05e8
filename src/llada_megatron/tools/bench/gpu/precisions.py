"""The precisions that a GPU trains in: bf16, and the FP8 recipes that it has."""

from __future__ import annotations

import dataclasses
from typing import Any

from llada_megatron.tools.bench.gpu.machine import Machine


@dataclasses.dataclass(frozen=True)
class Precision:
    """A name, and the keys of `training` that bring it about."""

    name: str
    training: dict[str, Any]
    fp8: bool = False


BF16 = Precision("bf16", {"precision": "bf16"})


def precisions(machine: Machine) -> list[Precision]:
    """bf16 first."""
    return [BF16]
