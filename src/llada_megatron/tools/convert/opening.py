"""A checkpoint of either kind, opened."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Protocol

import torch

from llada_megatron.llada_moe.config.schema import ModelConfig, ObjectiveConfig
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.huggingface.safetensors_reader import pickles
from llada_megatron.llada_moe.huggingface.weights import Unit, units
from llada_megatron.parallel.checkpoint.search import find_checkpoints
from llada_megatron.tools.convert.findings import Findings
from llada_megatron.tools.convert.huggingface import CONFIG, HuggingFaceSource
from llada_megatron.tools.convert.sharded import ShardedSource


class Source(Protocol):
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


def open_source(path: Path) -> Source:
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


def unit_bytes(source: Source, unit: Unit) -> int:
    """Of a unit's tensor, as stored."""
    return math.prod(unit.shape) * source.dtype(unit).itemsize


def stored_bytes(source: Source) -> int:
    """Of all that its model consists of."""
    return sum(unit_bytes(source, unit) for unit in units(source.model))


def _is_sharded(path: Path) -> bool:
    """Whether pickles in a directory are those that belong to a sharded checkpoint, or lie about in a run's."""
    try:
        return bool(find_checkpoints(path))
    except CheckpointError:
        return any(path.glob("*.distcp"))
