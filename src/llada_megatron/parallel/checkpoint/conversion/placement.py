"""Which rank of a layout holds which part of a weight, by closed forms, and whether parts tile a weight.

A weight that several ranks hold is given to the first of them. The parts end where those end that a run of the layout
asks for, so that each rank finds its weights in its own files; that is a matter of speed only, since a checkpoint can
be read under any layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig, MoEConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.model.parameters import stage_layers

Numbers = tuple[int, ...]


class Box(NamedTuple):
    """A part of a tensor: where it begins and how long it is on each axis."""

    offsets: Numbers
    sizes: Numbers

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.sizes)

    def common(self, other: Box) -> Box | None:
        """The intersection of both boxes, or None if it is empty."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = [min(a + n, b + m) for a, n, b, m in zip(*self, *other, strict=True)]
        if any(end <= start for start, end in zip(starts, ends, strict=True)):
            return None
        return Box(starts, tuple(end - start for start, end in zip(starts, ends, strict=True)))

    def inside(self, outer: Box) -> tuple[slice, ...]:
        """This box as slices of a tensor that holds the box `outer`."""
        starts = [a - b for a, b in zip(self.offsets, outer.offsets, strict=True)]
        return tuple(slice(start, start + size) for start, size in zip(starts, self.sizes, strict=True))


def tiling_fault(shape: Numbers, boxes: Sequence[Box]) -> str | None:
    """Why `boxes` do not fill a tensor of `shape` exactly once, or None."""
    for box in boxes:
        if not len(box.offsets) == len(box.sizes) == len(shape):
            return f"has a part with {len(box.sizes)} axes"
        if any(a < 0 or n < 1 or a + n > size for a, n, size in zip(*box, shape, strict=True)):
            return f"has a part outside its shape, at {list(box.offsets)}"
    held, expected = sum(box.volume for box in boxes), math.prod(shape)
    ordered = sorted(boxes)
    for number, box in enumerate(ordered):
        for other in ordered[number + 1 :]:
            if shape and other.offsets[0] >= box.offsets[0] + box.sizes[0]:
                break
            if box.common(other):
                return f"has two parts that overlap, at {list(other.offsets)}"
    return None if held == expected else f"has parts of {held:,} elements together instead of {expected:,}"


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")

_EMBEDDING = "embedding.word_embeddings.weight"

_EXPERTS = ".mlp.experts."

_SHARED = ".mlp.shared_experts."

_GATE_AND_UP = "linear_fc1.weight"

_BY_COLUMNS = ("linear_proj.weight", "linear_fc2.weight")

_VECTORS = ("layernorm.weight", "expert_bias")


class RankShard(NamedTuple):
    """What one rank holds of a slice of a weight."""

    rank: int
    offsets: tuple[int, ...]
    """Where the shard begins in the whole weight."""
    slices: tuple[slice, ...]
    """The shard within the slice of the weight that was given."""


def rank_shards(
    model: ModelConfig, layout: LayoutConfig, key: str, index: tuple[int, ...], first_row: int, rows: int
) -> list[RankShard]:
    """Which ranks hold `tensor[index][first_row : first_row + rows]` of the weight `key`, and which part each.

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
                found.append(RankShard(first + part, offsets, (own,) if vector else (own, columns)))
    return found


def _holders(model: ModelConfig, layout: LayoutConfig, key: str, index: tuple[int, ...]) -> tuple[int, int]:
    """The first rank that holds a part of the weight, and how many consecutive ranks do.

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
    """Length of the axis that tensor parallelism cuts, for gate and up that of each; None if the weight is not cut."""
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
    """First row, end of the rows (None = all) and columns of each range that `part` of `parts` holds."""
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
