"""A checkpoint of either kind as a source of canonical weights: opened, in units, and watched for changes."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.huggingface import weights
from llada_megatron.llada_moe.huggingface.safetensors_reader import pickles
from llada_megatron.llada_moe.huggingface.weights import Unit, units
from llada_megatron.parallel.checkpoint.search import find_checkpoints
from llada_megatron.tools.convert.findings import Findings
from llada_megatron.tools.convert.huggingface_source import CONFIG, HuggingFaceSource
from llada_megatron.tools.convert.sharded_source import ShardedSource
from llada_megatron.tools.convert.workspace import Workspace, changes

FILES = "source's files"
"""Their key in a plan."""


def file_states(paths: Iterable[Path]) -> dict[str, str]:
    """By name what shows that a file has changed: its size, and when it was written (UTC)."""
    states = {}
    for path in paths:
        found = path.stat()
        seconds, rest = divmod(found.st_mtime_ns, 10**9)
        date = datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
        states[path.name] = f"{found.st_size:,} bytes of {date}.{rest:09}"
    return states


def require_unchanged(workspace: Workspace, paths: Iterable[Path]) -> None:
    """Raises: CheckpointError: one of the source's files was written since the conversion began."""
    try:
        now = file_states(paths)
    except OSError as error:
        raise CheckpointError(f"{error.filename} went away while it was converted ({error.strerror})") from error
    before = workspace.plan[FILES]
    if before != now:
        raise CheckpointError(
            f"the source changed while it was converted ({changes(before, now)}), and the output may be of either: "
            f"wait until nothing writes there, remove {workspace.root}, and repeat the command"
        )


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


class CheckpointSource(Protocol):
    """What both kinds can do. Threads may share one."""

    directory: Path
    model: ModelConfig

    @property
    def objective(self) -> ObjectiveConfig:
        """What its weights were trained with."""

    @property
    def kind(self) -> str:
        """What it is, for people."""

    @property
    def tokenizer(self) -> Path | None:
        """Its tokenizer's folder or file, if it is there."""

    def compare(self) -> Findings:
        """Its tensors against those of its model."""

    def require_whole(self) -> list[str]:
        """Notes on what is left out. Raises CheckpointError: its tensors are not those of its model."""

    def dtypes(self) -> dict[str, int]:
        """Parameters by dtype."""

    def dtype(self, unit: Unit) -> torch.dtype:
        """Of a unit's tensor, as stored."""

    def read(self, unit: Unit, dtype: torch.dtype | None = None) -> torch.Tensor:
        """A unit's tensor, as stored or in `dtype`."""

    def details(self) -> dict[str, Any]:
        """What else there is to say of it."""

    def close(self) -> None:
        """Close its files."""


def open_source(path: Path) -> CheckpointSource:
    """A Hugging Face directory, a step directory, or the newest whole checkpoint of a run.

    Raises:
        CheckpointError: neither, or its description cannot be read.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory: give a checkpoint's")
    published = (path / CONFIG).exists() or any(path.glob("*.safetensors*"))
    if published or (pickles(path) and not _is_sharded(path)):
        return HuggingFaceSource(path, require_mask=False)
    return ShardedSource(path)


def unit_bytes(source: CheckpointSource, unit: Unit) -> int:
    """Of a unit's tensor, as stored."""
    return math.prod(unit.shape) * source.dtype(unit).itemsize


def stored_bytes(source: CheckpointSource) -> int:
    """Of all that its model consists of."""
    return sum(unit_bytes(source, unit) for unit in units(source.model))


def _is_sharded(path: Path) -> bool:
    """Whether pickles in a directory are those that belong to a sharded checkpoint, or lie about in a run's."""
    try:
        return bool(find_checkpoints(path))
    except CheckpointError:
        return any(path.glob("*.distcp"))
