"""How the tensors of a checkpoint compare with those of its model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.huggingface.weights import BLOCK_ELEMENTS
from llada_megatron.llada_moe.model.parameters import count_parameters

_MOST_NAMES = 5
_LISTED = 100_000
"""Missing tensors, or units of large ones, that can be described one by one in a few seconds."""
_MOST_PADDING = 128 * 64
"""Megatron pads to a multiple of 128 rows per tensor-parallel rank."""


@dataclass
class Findings:
    """Names of tensors, by what is wrong with them."""

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    """Each with its name, the expected and the found shape."""
    notes: list[str] = field(default_factory=list)
    """What is left out on purpose."""

    def faults(self) -> Iterator[str]:
        """One line per kind of fault, with the first few names."""
        for words, names in (
            ("missing", self.missing),
            ("not of this model", self.extra),
            ("of a wrong shape", self.misshapen),
        ):
            if names:
                more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
                count = f"{len(names)} tensors are" if len(names) > 1 else "1 tensor is"
                yield f"{count} {words}: {', '.join(names[:_MOST_NAMES])}{more}"

    def require_none(self, directory: Path, what: str) -> list[str]:
        """The notes. Raises CheckpointError: there are faults."""
        faults = list(self.faults())
        if faults:
            raise CheckpointError(f"{directory} does not hold {what}: {'; '.join(faults)}")
        return self.notes


def parameters_by_dtype(tensors: Iterable[tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, int]:
    """How many numbers of each dtype, as torch names it, tensors of these dtypes and shapes hold."""
    counts: Counter[str] = Counter()
    for dtype, shape in tensors:
        counts[str(dtype).removeprefix("torch.")] += math.prod(shape)
    return dict(counts)


def is_padding(expected: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """Whether a weight of `expected` shape, a row per token, is there with a plausible number of unused rows below.

    More of them than tokens, or than padding to a multiple makes, are another vocabulary.
    """
    if len(found) != len(expected) or found[1:] != expected[1:]:
        return False
    return 0 < found[0] - expected[0] < min(expected[0], _MOST_PADDING)


def require_comparable(model: ModelConfig, tensors: int, elements: int, file: str) -> None:
    """Refuse sizes that are orders of magnitude above what is there, before every tensor of the model is described.

    Args:
        tensors: how many are there.
        elements: of all of them.
        file: that describes `model`.

    Raises:
        CheckpointError: so large a model cannot be there, not even in part.
    """
    experts = model.moe.num_experts if model.moe else 0
    if model.num_layers * max(experts, 1) > max(tensors, _LISTED):
        what = f"{model.num_layers:,} layers" + (f" of {experts:,} experts" if experts else "")
        raise CheckpointError(f"{file} describes {what}, and there are {tensors:,} tensors: it is of another model")
    described = count_parameters(model).total
    if described > max(2 * elements, _LISTED * BLOCK_ELEMENTS):
        raise CheckpointError(
            f"{file} describes {described:,} parameters, and there are {elements:,}: it is of another model"
        )
