"""The precisions that a GPU trains in: bf16, and the FP8 recipes that it has."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from llada_megatron.llada_moe.config.fp8 import FP8Config
from llada_megatron.llada_moe.model.accelerations import transformer_engine_active
from llada_megatron.parallel.fp8 import recipes
from llada_megatron.tools.bench.gpu.measured_machine import Machine


@dataclasses.dataclass(frozen=True)
class Precision:
    """A name, and the keys of `training` that bring it about."""

    name: str
    training: dict[str, Any]
    fp8: bool = False


BF16 = Precision("bf16", {"precision": "bf16"})


def precisions(machine: Machine) -> list[Precision]:
    """bf16 first, then each FP8 recipe that the GPU, torch and Transformer Engine can run."""
    if machine.toy or not transformer_engine_active():
        return [BF16]
    capability, cuda = divmod(machine.capability, 10), torch.version.cuda or "0"
    able = [recipe for recipe in recipes.FORMATS if recipes.obstacle(recipe, capability, cuda) is None]
    return [
        BF16,
        *(Precision(f"FP8 {name}", {"precision": "bf16", "fp8": FP8Config(recipe=name)}, True) for name in able),
    ]


def forget_scales() -> None:
    """Let go of the scales of a model that is gone: Transformer Engine would go on to update them with every model."""
    if transformer_engine_active():
        from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

        FP8GlobalStateManager.reset()
