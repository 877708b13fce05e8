"""Work on any checkpoint with experts (of a run, an import, or Hugging Face's), in this process or in several ranks."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.console import message
from llada_megatron.llada_moe.config.layout import LayoutConfig, check_layout
from llada_megatron.llada_moe.errors import ConfigError, LladaError, ResourceError
from llada_megatron.parallel.ranks import RankFailure, run_ranks
from llada_megatron.tools.convert.huggingface_source import HuggingFaceSource
from llada_megatron.tools.convert.importer import ImportOptions, import_checkpoint
from llada_megatron.tools.convert.inspector import open_source
from llada_megatron.tools.convert.tasks import default_workers

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.model import ModelConfig
    from llada_megatron.parallel.checkpoint.loaded_model import Precision

_TIME_LIMIT_S = 24 * 3600.0
"""Ranks that hang are ended at last."""


@dataclass(frozen=True)
class OpenOptions:
    """How a checkpoint is opened."""

    layout: LayoutConfig = field(default_factory=LayoutConfig)
    """What its model is spread over; sequence parallelism is for training alone and left out."""
    precision: Precision | None = None
    """None = that of the run."""
    mask_token_id: int | None = None
    """Of a Hugging Face model that does not say."""


def with_checkpoint(path: str, options: OpenOptions, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work(loaded, *arguments)` returns, on rank 0 where there are several ranks, which all call it.

    `work` is then a function at the top level of a module; arguments and result are pickled.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged.
        ConfigError: it holds a dense model, or one that the layout does not fit.
        ResourceError: there are fewer GPUs than ranks, or a rank failed.
    """
    from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint

    with _sharded(path, options) as checkpoint:
        if options.layout.world_size == 1:
            with open_checkpoint(checkpoint, options.precision) as loaded:
                return work(loaded, *arguments)
        return _in_ranks(checkpoint, options, work, arguments)


@contextmanager
def _sharded(path: str, options: OpenOptions) -> Iterator[str]:
    """A checkpoint of ours with the same weights: itself, or for as long as the block lasts an import."""
    source = open_source(Path(path))
    try:
        model, published = source.model, isinstance(source, HuggingFaceSource)
    finally:
        source.close()
    _check(path, model, options.layout)
    with tempfile.TemporaryDirectory(prefix="llada-experts-") as scratch:
        if published:
            target = Path(scratch) / "imported"
            importing = ImportOptions(
                layout=LayoutConfig(), mask_token_id=options.mask_token_id, workers=default_workers()
            )
            for note in import_checkpoint(Path(path), target, importing)["notes"]:
                message(f"note: {note}")
            path = str(target)
        yield path


def _check(path: str, model: ModelConfig, layout: LayoutConfig) -> None:
    if model.moe is None:
        raise ConfigError(f"{path} holds a dense model (family {model.family}): it has no experts to look at")

    def refuse(key: str, reason: str) -> None:
        raise ConfigError(f"--layout: {key}: {reason}")

    check_layout(model, layout, refuse)


def _in_ranks(checkpoint: str, options: OpenOptions, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    ranks = options.layout.world_size
    message(f"{ranks} processes")
    try:
        result = run_ranks(_rank, ranks, checkpoint, options, work, arguments, timeout=_TIME_LIMIT_S)[0]
    except RankFailure as failure:
        last = str(failure).strip().splitlines()[-1]
        raise ResourceError(f"one of {ranks} ranks failed: {last} (--traceback shows where)") from failure
    if isinstance(result, LladaError):
        raise result
    return result


def _rank(checkpoint: str, options: OpenOptions, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """On each rank. An error of the user's, which every rank finds, is returned; rank 0 alone prints."""
    import torch

    from llada_megatron.parallel import topology
    from llada_megatron.parallel.checkpoint.loaded_model import load_checkpoint

    layout = replace(options.layout, sequence_parallel=False)
    topology.initialize(layout, seed=0)
    first = torch.distributed.get_rank() == 0
    with contextlib.nullcontext() if first else contextlib.redirect_stderr(io.StringIO()):
        try:
            result = work(load_checkpoint(checkpoint, layout, options.precision), *arguments)
        except LladaError as error:
            return error
    return result if first else None
