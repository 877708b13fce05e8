"""Which rows of a format's tensors make up each unit of canonical weights, and copies of them in both directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.huggingface import weights
from llada_megatron.llada_moe.huggingface.formats.table import Format
from llada_megatron.llada_moe.huggingface.weights import Unit, units


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of the Hugging Face tensor `name`, whose whole shape is `shape`."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Mapping:
    """A unit and the parts that it consists of, in order."""

    unit: Unit
    parts: tuple[Part, ...]


def mappings(table: Format, model: ModelConfig) -> Iterator[Mapping]:
    """Every unit of `model` with its parts in the format `table`, in the order of the forward pass.

    Raises:
        CheckpointError: the format has no tensor for one of the model's weights.
    """
    for unit in units(model):
        weight = unit.weight
        if weight.pattern not in table.names:
            raise CheckpointError(f"{table.title} has no tensor for {weight.key}")
        names = [name.format(layer=weight.layer, expert=unit.expert) for name in table.names[weight.pattern]]
        yield Mapping(unit, _parts(unit, names, model))


def tensor_shapes(table: Format, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint of `model`, in the order of the forward pass."""
    return {part.name: part.shape for mapping in mappings(table, model) for part in mapping.parts}


def merge(unit: Unit, parts: Sequence[torch.Tensor], model: ModelConfig) -> torch.Tensor:
    """The tensor of a unit, from the tensors of its parts."""
    whole = parts[0] if len(parts) == 1 else torch.cat(list(parts))
    return interleave(whole, model) if unit.weight.pattern == weights.QKV else whole


def split(mapping: Mapping, tensor: torch.Tensor, model: ModelConfig) -> list[torch.Tensor]:
    """The tensors of a unit's parts, from the tensor of the unit; the inverse of `merge`."""
    whole = concatenate(tensor, model) if mapping.unit.weight.pattern == weights.QKV else tensor
    return list(whole.split([part.stop - part.start for part in mapping.parts]))


def interleave(concatenated: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """Reorder all queries, all keys, all values to Megatron's order: for each query group its queries, key and value.

    Input and result are `[(heads + 2 * kv_heads) * head_dim, hidden]`.
    """
    groups = model.num_key_value_heads
    rows = concatenated.split(_projection_rows(model))
    grouped = [part.reshape(groups, -1, concatenated.shape[1]) for part in rows]
    return torch.cat(grouped, dim=1).reshape(concatenated.shape)


def concatenate(interleaved: torch.Tensor, model: ModelConfig) -> torch.Tensor:
    """The inverse of `interleave`."""
    groups, width = model.num_key_value_heads, interleaved.shape[1]
    grouped = interleaved.reshape(groups, -1, width).split([rows // groups for rows in _projection_rows(model)], dim=1)
    return torch.cat([part.reshape(-1, width) for part in grouped])


def _projection_rows(model: ModelConfig) -> list[int]:
    """Number of rows of the query, key and value projections."""
    keys = model.num_key_value_heads * model.head_dim
    return [model.num_attention_heads * model.head_dim, keys, keys]


def _parts(unit: Unit, names: Sequence[str], model: ModelConfig) -> tuple[Part, ...]:
    """The parts of a unit, whose weight consists of the rows of the tensors `names`, one after another."""
    shape = unit.weight.shape
    counts = [shape[0] // len(names)] * len(names)
    if unit.weight.pattern == weights.QKV and len(names) > 1:
        counts = _projection_rows(model)
    parts, first = [], 0
    for name, count in zip(names, counts, strict=True):
        start, stop = max(unit.start - first, 0), min(unit.stop - first, count)
        if start < stop:
            parts.append(Part(name, (count, *shape[1:]), start, stop))
        first += count
    return tuple(parts)
