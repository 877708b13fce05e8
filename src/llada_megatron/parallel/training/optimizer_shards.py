"""The optimizer's state as this rank holds it, in the names and shapes of the weights.

Megatron's distributed optimizer keeps, of each weight, a range of its flattened elements on each data-parallel rank.
Its own format that loads under any layout (`fully_reshardable`) gathers these ranges on one rank when saving, and reads
whole weights on every rank when loading. Here a range is cut into boxes of the weight instead: part of a row, whole
rows, part of a row. Each rank writes its own boxes and reads its own boxes, whatever was written; nothing is exchanged.
The names (`optimizer.state.exp_avg.WEIGHT`) and whole shapes are Megatron's, so checkpoints of either kind load.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

STATES = ("param", "exp_avg", "exp_avg_sq")
"""What is kept of each weight: its fp32 main copy and Adam's moments, by Megatron's names."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and sizes of a box in a tensor."""


class _Part(NamedTuple):
    """A box of a weight that lies on this rank."""

    start: int
    """Where its elements begin in this rank's range of the weight."""
    shard: ShardedTensor
    """Where it lies in the whole weight; without data."""

    @property
    def stop(self) -> int:
        """Where its elements end."""
        return self.start + math.prod(self.shard.local_shape)


def saved_state(optimizer: Any, model: dict[str, Any]) -> dict[str, ShardedTensor]:
    """The state on this rank of one of Megatron's distributed optimizers, to be saved.

    Args:
        model: sharded state of all model chunks, in which the weights are parameters.
    """
    state = {}
    for weight, parts in _weights(optimizer, model):
        tensors = optimizer._get_main_param_and_optimizer_states(weight)
        for name in STATES:
            values = tensors[name].detach()
            if values.dtype is not torch.float32:  # chosen because the GPU's memory is short: the copy is on the host
                values = values.float().cpu()
            values = values.flatten()
            for part in parts:
                state[f"{len(state)}"] = _filled(part, name, values[part.start : part.stop])
    return state


def empty_state(optimizer: Any, model: dict[str, Any]) -> dict[str, ShardedTensor]:
    """A template on the host to load `saved_state` into, of any layout; arguments as there."""
    parts = [(part, name) for _, parts in _weights(optimizer, model) for name in STATES for part in parts]
    return {
        f"{index}": _filled(part, name, torch.empty(part.stop - part.start)) for index, (part, name) in enumerate(parts)
    }


def load_state(optimizer: Any, model: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
    """Put what was loaded into an `empty_state` into the optimizer; arguments as there."""
    index = 0
    for weight, parts in _weights(optimizer, model):
        tensors = {}
        for name in STATES:
            loaded = [state[f"{index + number}"].flatten() for number in range(len(parts))]
            tensors[name] = torch.cat(loaded)
            index += len(parts)
        with torch.no_grad():
            optimizer._set_main_param_and_optimizer_states(weight, tensors)


def _weights(optimizer: Any, model: dict[str, Any]) -> Iterator[tuple[torch.nn.Parameter, list[_Part]]]:
    """The weights of which this rank holds a range, each with the boxes that the range consists of, in its order."""
    sharded, _ = extract_sharded_tensors_and_factories(model)
    named = {entry.data: entry for entry in nested_values(sharded)}
    for buffer in optimizer.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for weight, ranges in bucket["param_map"].items():
                    held = ranges["param"]
                    yield weight, list(_parts(named[weight], weight.shape, held.start, held.end))


def _parts(entry: ShardedTensor | ShardedTensorFactory, shape: torch.Size, start: int, stop: int) -> Iterator[_Part]:
    """The boxes of the elements `start` to `stop` of a weight, in their order."""
    for first, shard in _tensors(entry, shape):
        last = first + math.prod(shard.local_shape)
        begin, end = max(start, first), min(stop, last)
        done = begin - start
        for offset, sizes in boxes(shard.local_shape, begin - first, end - first):
            yield _Part(done, _cut(shard, offset, sizes))
            done += math.prod(sizes)


def _tensors(entry: ShardedTensor | ShardedTensorFactory, shape: torch.Size) -> list[tuple[int, ShardedTensor]]:
    """The tensors that a weight is saved as (gate and up of a fused matrix are two), and where each begins in it."""
    if isinstance(entry, ShardedTensor):
        return [(0, entry)]
    outline = torch.empty(shape, device="meta")  # the views that a factory makes of it tell where they lie
    built = list(nested_values({"": entry.build_fn(entry.key, outline, entry.replica_id, None)}))
    assert all(shard.data.is_contiguous() for shard in built), entry.key
    return sorted(((shard.data.storage_offset(), shard) for shard in built), key=lambda found: found[0])


def _cut(shard: ShardedTensor, offset: tuple[int, ...], sizes: tuple[int, ...]) -> ShardedTensor:
    """A box of a shard: held by this data-parallel rank alone, and not on the grid that layouts cut weights by."""
    axes = shard.prepend_axis_num
    place = tuple(a + b for a, b in zip(shard.global_offset, (0,) * axes + offset, strict=True))
    return ShardedTensor(
        key=shard.key,
        data=None,
        dtype=torch.float32,
        local_shape=(1,) * axes + sizes,
        global_shape=shard.global_shape,
        global_offset=place,
        axis_fragmentations=None,
        replica_id=(*shard.replica_id[:-1], 0),  # its last number counts data-parallel copies
        allow_shape_mismatch=shard.allow_shape_mismatch,
    )


def _filled(part: _Part, name: str, values: torch.Tensor) -> ShardedTensor:
    shard = part.shard
    data = values.view(shard.local_shape)
    return ShardedTensor(**vars(shard) | {"key": f"optimizer.state.{name}.{shard.key}", "data": data})


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The boxes that the elements `start` to `stop` of a flattened tensor of `shape` consist of, in their order."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows, if first < last
    if first > last:
        return _in_row(shape, last, start - last * row, stop - last * row)
    found = _in_row(shape, first - 1, start - (first - 1) * row, row) if start < first * row else []
    if first < last:
        found.append(((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:])))
    return found + _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    return [((row, *offset), (1, *sizes)) for offset, sizes in boxes(shape[1:], start, stop)]
