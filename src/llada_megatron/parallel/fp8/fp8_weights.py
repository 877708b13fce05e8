"""Weights that are kept in FP8 (`training.fp8.param_gather`), and how they are initialised, saved and loaded.

Transformer Engine makes them tensors of a class of its own, of which slices cannot be written. While they are
initialised, and for a checkpoint, their modules therefore hold plain tensors in their place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import fp8_utils

_Place = tuple[torch.nn.Module, str, Any]
"""A module, and the name and the weight that it holds."""


@contextlib.contextmanager
def initialising(chunks: list[torch.nn.Module]) -> Iterator[None]:
    """Inside, FP8 weights are plain tensors, to be written in place; then they are quantised, and what was written is
    what the optimizer's main weights begin with (as they do where weights are in bf16)."""
    written = [weight for _, _, weight in _places(chunks)]
    with filling(chunks) as plain:
        yield
        for weight, values in zip(written, plain, strict=True):
            weight.get_high_precision_init_val().copy_(values.detach())


@contextlib.contextmanager
def filling(chunks: list[torch.nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Inside, FP8 weights are the plain tensors that are yielded, to be written in place; then they are quantised."""
    places = _places(chunks)
    with in_high_precision(chunks):
        plain = [module._parameters[name] for module, name, _ in places]
        yield plain
    with torch.no_grad():
        for (_, _, weight), values in zip(places, plain, strict=True):
            weight.copy_(values)


@contextlib.contextmanager
def in_high_precision(chunks: list[torch.nn.Module]) -> Iterator[None]:
    """Inside, modules hold their FP8 weights as plain tensors of the same values; writing these changes nothing."""
    places = _places(chunks)
    try:
        for module, name, weight in places:
            module._parameters[name] = torch.nn.Parameter(weight.dequantize().detach(), requires_grad=False)
        yield
    finally:
        for module, name, weight in places:
            module._parameters[name] = weight


def _places(chunks: list[torch.nn.Module]) -> list[_Place]:
    return [
        (module, name, weight)
        for chunk in chunks
        for module in chunk.modules()
        for name, weight in module._parameters.items()
        if weight is not None and fp8_utils.is_float8tensor(weight)
    ]
