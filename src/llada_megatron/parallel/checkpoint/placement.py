"""Which rank of a layout holds which part of a weight: closed forms, no process groups.

A weight that several ranks hold is given to the first of them. The parts end where those end that a run of the layout
asks for, so that each rank finds its weights in its own files; that is a matter of speed only, since a checkpoint can
be read under any layout.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from llada_megatron.llada_moe.config.schema import LayoutConfig, ModelConfig, MoEConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.model.parameters import stage_layers

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")
_EMBEDDING = "embedding.word_embeddings.weight"
_EXPERTS = ".mlp.experts."
_SHARED = ".mlp.shared_experts."
_GATE_AND_UP = "linear_fc1.weight"
_BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
_VECTORS = ("layernorm.weight", "expert_bias")


class Piece(NamedTuple):
    """One rank's part of a slice of a weight."""

    rank: int
    offsets: tuple[int, ...]
    """Where the part begins in the whole weight."""
    slices: tuple[slice, ...]
    """The part within the slice."""


def pieces(
    model: ModelConfig, layout: LayoutConfig, key: str, index: tuple[int, ...], first_row: int, rows: int
) -> list[Piece]:
    """The parts of `tensor[index][first_row : first_row + rows]` of the weight `key`.

    Args:
        index: the expert, for a weight with an expert axis; else empty.

    Raises:
        ConfigError: the layout does not divide the weight.
    """
    first, parts = _holders(model, layout, key, index)
    length = _cut_length(model, key)
    if length is None:
        parts = 1
    elif length % parts:
        raise ConfigError(f"{parts} tensor-parallel ranks do not divide {key}, which is {length} wide; use fewer")
    found = []
    for part in range(parts):
        for top, bottom, columns in _shares(key, length, part, parts):
            begin, end = max(top, first_row), first_row + rows if bottom is None else min(bottom, first_row + rows)
            if begin < end:
                own = slice(begin - first_row, end - first_row)
                vector = key.endswith(_VECTORS)
                offsets = (*index, begin) if vector else (*index, begin, columns.start or 0)
                found.append(Piece(first + part, offsets, (own,) if vector else (own, columns)))
    return found


def _holders(model: ModelConfig, layout: LayoutConfig, key: str, index: tuple[int, ...]) -> tuple[int, int]:
    """The first rank that holds a part of the weight, and how many after one another do.

    The numbering of ranks is that of `rank_shares` in llada_moe/model/parameters.py.
    """
    first = _stage(model, layout, key) * (layout.world_size // layout.pipeline_parallel)
    if _EXPERTS not in key:
        return first, layout.tensor_parallel
    size, rest = divmod(_moe(model).num_experts, layout.expert_parallel)
    if rest:
        raise ConfigError(f"{layout.expert_parallel} expert-parallel ranks do not divide the experts of {key}")
    return first + index[0] // size * layout.expert_tensor_parallel, layout.expert_tensor_parallel


def _stage(model: ModelConfig, layout: LayoutConfig, key: str) -> int:
    stages = layout.pipeline_parallel
    match = _LAYER.match(key)
    if match is None:
        return 0 if key == _EMBEDDING else stages - 1
    holding = (stage for stage in range(stages) if int(match[1]) in stage_layers(model, layout, stage))
    stage = next(holding, None)
    if stage is None:
        raise ConfigError(f"{stages} pipeline stages do not divide the {model.num_layers} layers; {key} has no place")
    return stage


def _cut_length(model: ModelConfig, key: str) -> int | None:
    """Length of what tensor parallelism cuts (of one half, where gate and up lie above one another), None if whole."""
    heads, key_heads, width = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    if key.endswith((_EMBEDDING, "output_layer.weight")):
        return model.vocab_size
    if key.endswith("linear_qkv.weight"):
        return (heads + 2 * key_heads) * width
    if key.endswith("linear_proj.weight"):
        return heads * width
    if not key.endswith(("linear_fc1.weight", "linear_fc2.weight")):
        return None
    if _EXPERTS in key:
        return _moe(model).expert_ffn_hidden_size
    return _moe(model).shared_expert_ffn_hidden_size if _SHARED in key else model.ffn_hidden_size


def _shares(key: str, length: int | None, part: int, parts: int) -> Iterator[tuple[int, int | None, slice]]:
    """First row, end of the rows (None = all) and columns of each stretch that `part` of `parts` holds."""
    if length is None:
        yield 0, None, slice(None)
        return
    start, stop = part * length // parts, (part + 1) * length // parts
    if key.endswith(_BY_COLUMNS):
        yield 0, None, slice(start, stop)
        return
    yield start, stop, slice(None)
    if key.endswith(_GATE_AND_UP):
        yield length + start, length + stop, slice(None)


def _moe(model: ModelConfig) -> MoEConfig:
    if model.moe is None:
        raise ConfigError("the model has no experts")
    return model.moe
