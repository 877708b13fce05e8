"""Which tensors of an export are in which file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from llada_megatron.console import size_text
from llada_megatron.llada_moe.huggingface.formats.table import Format
from llada_megatron.llada_moe.huggingface.mapping import Mapping, mappings
from llada_megatron.tools.convert.sharded import ShardedSource
from llada_megatron.tools.convert.units import kept_dtype


@dataclass
class Shard:
    """One file of the export: its tensors in order, and the units that fill them."""

    mappings: list[Mapping] = field(default_factory=list)
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    size: int = 0


def plan_shards(source: ShardedSource, table: Format, wanted: torch.dtype | None, shard_bytes: int) -> list[Shard]:
    """The files to write: tensors in the order of the forward pass.

    Args:
        wanted: dtype of the weights; None = as stored.

    A file has at most `shard_bytes` of them. What is converted together stays together, tensors are not cut, and those
    that are larger have a file to themselves.
    """
    shards = [Shard()]
    for group in _whole_tensors(table, source):
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for mapping in group:
            dtype = kept_dtype(mapping.unit, source.dtype(mapping.unit), wanted)
            tensors |= {part.name: (dtype, part.shape) for part in mapping.parts}
        size = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in tensors.values())
        if shards[-1].size and shards[-1].size + size > shard_bytes:
            shards.append(Shard())
        shards[-1].mappings += group
        shards[-1].tensors |= tensors
        shards[-1].size += size
    return shards


def size_notes(shards: list[Shard], shard_bytes: int) -> list[str]:
    """A note on files that are larger than they should be."""
    larger = [shard.size for shard in shards if shard.size > shard_bytes]
    if not larger:
        return []
    count = f"{len(larger)} files exceed" if len(larger) > 1 else "1 file exceeds"
    return [
        f"{count} --shard-size, by up to {size_text(max(larger) - shard_bytes)}: no tensor is cut, and "
        "projections that are converted together stay together"
    ]


def _whole_tensors(table: Format, source: ShardedSource) -> Iterator[list[Mapping]]:
    """The mappings, those of one large tensor's blocks of rows together."""
    group: list[Mapping] = []
    for mapping in mappings(table, source.model):
        if group and mapping.parts[0].start == 0:
            yield group
            group = []
        group.append(mapping)
    yield group
