"""Initial weights that do not depend on how the model is spread.

Every weight is drawn from a generator seeded by (seed, its global name, its layer and expert), as a whole, and a rank
keeps its own slice: one process and any layout start from the same numbers.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from llada_megatron.llada_moe.config.trained_parts import FACTORS

RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


@torch.no_grad()
def initialize_weights(sharded: list[ShardedTensor], seed: int, std: float, num_layers: int) -> None:
    """Fill the matrices behind `sharded` in place: N(0, std), outputs of residual branches N(0, std / sqrt(2 layers)).

    The scaling of the residual branches is that of GPT-2 (and Megatron's default). Of low-rank factors, A has the
    deviation that PEFT gives it, 1 / sqrt(3 input), and B is 0, so that a run begins with the model as it was. Vectors
    (norm weights of one, expert biases of zero) are left as built.

    Args:
        sharded: tensors of a model's sharded state; their `data` are views of the parameters.
    """
    whole: dict[str, torch.Tensor] = {}
    for entry in sharded:
        if entry.data is None or entry.data.dim() < 2:
            continue
        axes = entry.prepend_axis_num
        unit = (entry.key, *entry.global_offset[:axes])
        name = str(unit)
        if name not in whole:
            shape = entry.global_shape[axes:]
            whole = {name: draw(seed, unit, shape, _deviation(entry.key, shape, std, num_layers))}
        start = entry.global_offset[axes:]
        slices = tuple(slice(a, a + n) for a, n in zip(start, entry.data.shape, strict=True))
        entry.data.copy_(whole[name][slices])


def _deviation(key: str, shape: tuple[int, ...], std: float, num_layers: int) -> float:
    if key.endswith(FACTORS):
        return 1 / math.sqrt(3 * shape[1]) if key.endswith(FACTORS[0]) else 0.0
    return std / math.sqrt(2 * num_layers) if key.endswith(RESIDUAL_OUTPUTS) else std


@torch.no_grad()
def draw_in_place(sharded: list[ShardedTensor], seed: int, std: float, num_layers: int) -> None:
    """Fill the matrices where they are with N(0, std) of the device's own generator, whatever their layer.

    For measurements of time: `initialize_weights` draws on the host, a minute for seven billion weights.
    """
    torch.manual_seed(seed)
    for entry in sharded:
        if entry.data is not None and entry.data.dim() >= 2:
            entry.data.normal_(0.0, std)


def draw(seed: int, unit: tuple[Any, ...], shape: tuple[int, ...], std: float) -> torch.Tensor:
    """One weight of `shape` from N(0, std), float32 on the host.

    Args:
        unit: the weight's name in a checkpoint, and where it lies on the axes that are stacked there (the expert).
    """
    digest = hashlib.sha256(repr((seed, *unit)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2**63 - 1))
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
