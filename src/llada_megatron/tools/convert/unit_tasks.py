"""The tasks that write a sharded checkpoint unit by unit, whatever its weights are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig, check_layout
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.huggingface.weights import Unit
from llada_megatron.parallel.checkpoint.conversion.placement import rank_shards
from llada_megatron.parallel.checkpoint.conversion.shard_writer import TaskWriter
from llada_megatron.tools.convert.tasks import ByteProgress, TaskResult


def require_layout(model: ModelConfig, layout: LayoutConfig) -> None:
    """Raises ConfigError, with every reason, if the model cannot be cut for the layout of `--layout`."""
    reasons: list[str] = []
    check_layout(model, layout, lambda key, reason: reasons.append(f"{key.removeprefix('layout.')}: {reason}"))
    if reasons:
        raise ConfigError(f"--layout: {'; '.join(reasons)}")


def batches(dtypes: Mapping[Unit, torch.dtype], size: int) -> Iterator[tuple[list[Unit], int]]:
    """The units in batches of about `size` bytes, each with its size in bytes."""
    batch: list[Unit] = []
    total = 0
    for unit, dtype in dtypes.items():
        batch.append(unit)
        total += unit.elements * dtype.itemsize
        if total >= size:
            yield batch, total
            batch, total = [], 0
    if batch:
        yield batch, total


def write_units(
    step: Path,
    number: int,
    batch: list[Unit],
    read: Callable[[Unit], torch.Tensor],
    model: ModelConfig,
    layout: LayoutConfig,
    progress: ByteProgress,
) -> TaskResult:
    """Task `number`: make each unit of the batch once with `read`, and write the shard of each rank of `layout`.

    Args:
        step: the step directory that is being written.
        read: gives the tensor of a unit, in the dtype to be written.
    """
    writer = TaskWriter(step, number)
    try:
        for unit in batch:
            tensor = read(unit)
            weight = unit.weight
            rows = unit.stop - unit.start
            for shard in rank_shards(model, layout, weight.key, unit.index, unit.start, rows):
                writer.append(shard.rank, weight.key, weight.global_shape, shard.offsets, tensor[shard.slices])
            progress.advance(tensor.nbytes)
        record = writer.close()
        return TaskResult(record, tuple(step / name for name in record["files"]))
    finally:
        writer.discard()
