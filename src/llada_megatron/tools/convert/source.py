"""What every kind of checkpoint can be asked, and how its tensors compare with those of its model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.finite import first_not_finite, is_finite
from llada_megatron.llada_moe.huggingface import weights
from llada_megatron.llada_moe.huggingface.weights import BLOCK_ELEMENTS, Unit, units
from llada_megatron.llada_moe.model.parameters import count_parameters

_MOST_NAMES = 5
_LISTED = 100_000
"""How many missing tensors, or units of large tensors, can be listed in a few seconds."""
_MOST_PADDING = 128 * 64
"""Rows: Megatron pads to a multiple of 128 rows per tensor-parallel rank."""


@dataclass
class Findings:
    """What is wrong with the tensors of a checkpoint: names of tensors for each kind of fault, and notes."""

    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    """Each with its name, the expected and the found shape."""
    explanation: str | None = None
    """Why the names are not those of the model, and what to do, if that is known."""
    notes: list[str] = field(default_factory=list)
    """What is ignored, and why that is right; a sentence each."""

    def faults(self) -> Iterator[str]:
        """The explanation, if there is one, and one line per kind of fault, with the first few names."""
        if self.explanation:
            yield self.explanation
        for fault, names in (
            ("missing", self.missing),
            ("not of this model", self.extra),
            ("of a wrong shape", self.misshapen),
        ):
            if names:
                more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
                count = f"{len(names)} tensors are" if len(names) > 1 else "1 tensor is"
                yield f"{count} {fault}: {', '.join(names[:_MOST_NAMES])}{more}"

    def require_none(self, directory: Path, what: str) -> list[str]:
        """Return the notes. Raises CheckpointError: there are faults, so `directory` does not hold `what` it should."""
        faults = list(self.faults())
        if faults:
            raise CheckpointError(f"{directory} does not hold {what}: {'; '.join(faults)}")
        return self.notes


class CheckpointSource(Protocol):
    """A checkpoint of either kind, whose weights are read in units. Threads may share one."""

    directory: Path
    model: ModelConfig

    @property
    def objective(self) -> ObjectiveConfig:
        """The objective that its weights were trained with."""

    @property
    def kind(self) -> str:
        """What kind of checkpoint it is, in words."""

    @property
    def tokenizer(self) -> Path | None:
        """The folder or file of its tokenizer, or None if that is not there."""

    def compare(self) -> Findings:
        """Compare its tensors with those of its model."""

    def require_whole(self) -> list[str]:
        """Return notes on what is ignored. Raises CheckpointError: its tensors are not those of its model."""

    def dtypes(self) -> dict[str, int]:
        """Number of parameters of each dtype, as torch names it."""

    def dtype(self, unit: Unit) -> torch.dtype:
        """The dtype in which a unit is stored."""

    def read(self, unit: Unit, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor of a unit, in `dtype` or as it is stored."""

    def not_finite(self, unit: Unit, dtype: torch.dtype | None = None) -> str | None:
        """Name of the tensor, position and value of the first NaN or infinity of a unit as `read` gives it, or None."""

    def details(self) -> dict[str, Any]:
        """`files` (a number), `bytes`, and `history` (name and value of what is known of its origin)."""

    def close(self) -> None:
        """Close its files."""


def require_finite(source: CheckpointSource, unit: Unit, tensor: torch.Tensor) -> None:
    """Refuse weights that are no numbers: one of them makes logits NaN, and sampling would write noise.

    Args:
        tensor: what `source.read(unit, …)` gave, of any shape.

    Raises:
        CheckpointError: naming the tensor of the checkpoint, the position and the value.
    """
    if not is_finite(tensor):
        raise CheckpointError(
            f"{source.directory}: not every weight is a finite number: {source.not_finite(unit, tensor.dtype)}. The "
            "file was damaged, or the training had diverged: take an undamaged copy or an earlier checkpoint"
        )


def place_not_finite(name: str, tensor: torch.Tensor, first_row: int = 0, index: tuple[int, ...] = ()) -> str | None:
    """Name, position and value of the first NaN or infinity of a part of the tensor `name`, or None.

    Args:
        tensor: rows from `first_row` on, at `index` of the leading axes.
    """
    found = first_not_finite(tensor)
    if found is None:
        return None
    position, value = list(found[0]), found[1]
    if position:
        position[0] += first_row
    return f"{name} is {value} at {[*index, *position]}"


def unit_bytes(source: CheckpointSource, unit: Unit) -> int:
    """Bytes of a unit as it is stored."""
    return unit.elements * source.dtype(unit).itemsize


def stored_bytes(source: CheckpointSource) -> int:
    """Bytes of all weights of the model as they are stored."""
    return sum(unit_bytes(source, unit) for unit in units(source.model))


def kept_dtype(unit: Unit, stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """The dtype to write a unit in. The expert bias stays in float32, in which it is published and updated."""
    if wanted is None:
        return stored
    return torch.float32 if unit.weight.pattern == weights.EXPERT_BIAS else wanted


def parameters_by_dtype(tensors: Iterable[tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, int]:
    """How many parameters of each dtype, as torch names it, tensors of these dtypes and shapes hold."""
    counts: Counter[str] = Counter()
    for dtype, shape in tensors:
        counts[str(dtype).removeprefix("torch.")] += math.prod(shape)
    return dict(counts)


def is_padding(expected: tuple[int, ...], found: tuple[int, ...]) -> bool:
    """Whether a weight with a row per token has the `expected` rows and a plausible number of padding rows after them.

    More rows than twice the tokens, or than padding to a multiple makes, belong to another vocabulary.
    """
    if len(found) != len(expected) or found[1:] != expected[1:]:
        return False
    return 0 < found[0] - expected[0] < min(expected[0], _MOST_PADDING)


def require_comparable(model: ModelConfig, tensors: int, elements: int, file: str) -> None:
    """Refuse a configuration that describes far more than is there, before all tensors of its model are listed.

    Args:
        tensors: number of tensors that are there.
        elements: number of their elements.
        file: the configuration that describes `model`.

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
