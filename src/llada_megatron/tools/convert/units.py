"""The units of a conversion: which dtype each is written in, how large it is, and which are done together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from llada_megatron.llada_moe.huggingface import weights
from llada_megatron.llada_moe.huggingface.weights import Unit


def unit_elements(unit: Unit) -> int:
    """Number of elements of its tensor."""
    return torch.Size(unit.shape).numel()


def kept_dtype(unit: Unit, stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype to write: the expert bias is in float32 in any case, in which it is published and updated."""
    return stored if wanted is None else torch.float32 if unit.weight.pattern == weights.EXPERT_BIAS else wanted


def batches(units: Iterable[Unit], dtypes: dict[Unit, torch.dtype], size: int) -> Iterator[tuple[list[Unit], int]]:
    """Consecutive units of about `size` bytes together, with their bytes."""
    batch: list[Unit] = []
    total = 0
    for unit in units:
        batch.append(unit)
        total += unit_elements(unit) * dtypes[unit].itemsize
        if total >= size:
            yield batch, total
            batch, total = [], 0
    if batch:
        yield batch, total
