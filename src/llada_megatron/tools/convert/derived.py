"""A sharded checkpoint made from other sharded ones: its weights, the tokenizer beside it, and its manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from llada_megatron import __version__
from llada_megatron.llada_moe.config import dump_yaml, to_dict
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.huggingface import weights
from llada_megatron.llada_moe.huggingface.tokenizer_export import find_tokenizer_files
from llada_megatron.llada_moe.huggingface.weights import Unit
from llada_megatron.parallel.checkpoint.conversion.shard_writer import finalize
from llada_megatron.parallel.checkpoint.manifest import step_name, sync_directory, write_durably
from llada_megatron.parallel.checkpoint.search import TOKENIZER, tokenizer_folder
from llada_megatron.tools.convert.importer import MODEL_FILE, TASK_BYTES
from llada_megatron.tools.convert.sharded_source import ShardedSource
from llada_megatron.tools.convert.tasks import ByteProgress, Task, TaskResult, run_tasks, workers_for_files
from llada_megatron.tools.convert.unit_tasks import batches, require_layout, write_units
from llada_megatron.tools.convert.workspace import FILES, Workspace, file_states

_OF_ONE_RUN = ("recovery", "validation", "sets")
"""Facts of a manifest that hold for the weights that a training saved, and for no others."""


@dataclass(frozen=True, kw_only=True)
class Derived:
    """A checkpoint to make. Its objective, training and tokenizer are those of the first source."""

    sources: list[ShardedSource]
    model: ModelConfig
    layout: LayoutConfig
    dtypes: dict[Unit, torch.dtype]
    """Every unit of `model`, and the dtype to write it in."""
    read: Callable[[Unit], torch.Tensor]
    """Gives the tensor of a unit in that dtype; called by several threads."""
    step: int
    """The step that it counts as: it decides which attention pattern a schedule gives."""
    facts: dict[str, Any]
    """What its manifest says beside the usual (JSON values)."""

    @property
    def run(self) -> RunConfig:
        """The configuration of a run in which nothing was trained since."""
        first = self.sources[0].run
        projection = next(dtype for unit, dtype in self.dtypes.items() if unit.weight.pattern == weights.QKV)
        precision = "fp32" if projection is torch.float32 else "bf16"
        training = replace(first.training.without_fp8(), precision=precision)
        return replace(first, model=self.model, layout=self.layout, training=training, output_dir="")


def derive(target: Path, derived: Derived, plan: dict[str, Any], workers: int, title: str) -> dict[str, Any]:
    """Write `derived` into the directory `target`: checkpoints/step-…, tokenizer/, model.yaml.

    Args:
        plan: the options that decide the bytes of the output, each by its name; the sources are added here.

    Returns:
        a summary: path of the checkpoint, number of tensors and parameters, bytes.

    Raises:
        CheckpointError: a source is damaged or changed meanwhile, or a weight is no finite number.
        ConfigError: the model cannot be cut for the layout, or the target is not empty.
        ResourceError: no space is left; the same command continues once there is some.
    """
    require_layout(derived.model, derived.layout)
    tokenizer = _tokenizer(derived.sources[0])
    with Workspace(target, plan | _plan(derived, tokenizer)) as workspace:
        if not workspace.complete:
            _fill(workspace, derived, tokenizer, workers, title)
        workspace.publish()
    return {
        "checkpoint": str(target / _place(derived)),
        "tensors": len({unit.weight.key for unit in derived.dtypes}),
        "parameters": sum(unit.elements for unit in derived.dtypes),
        "bytes": sum(unit.elements * dtype.itemsize for unit, dtype in derived.dtypes.items()),
    }


def _place(derived: Derived) -> Path:
    """Of the step directory, in the target."""
    return Path("checkpoints") / step_name(derived.step)


def _tokenizer(source: ShardedSource) -> dict[str, bytes]:
    """The files of the folder that the source carries, by name; empty if its tokenizer lies elsewhere."""
    folder = tokenizer_folder(source.directory)
    return {path.name: path.read_bytes() for path in find_tokenizer_files(folder)} if folder else {}


def _plan(derived: Derived, tokenizer: dict[str, bytes]) -> dict[str, Any]:
    return {
        FILES: file_states(_files(derived), whole_paths=True),
        "checkpoints": {
            str(source.directory): {name: stated.sha256 for name, stated in source.reader.manifest.files.items()}
            for source in derived.sources
        },
        "model": to_dict(derived.model),
        "--layout": to_dict(derived.layout),
        "dtypes": sorted({str(dtype) for dtype in derived.dtypes.values()}),
        "tokenizer": {name: hashlib.sha256(data).hexdigest() for name, data in tokenizer.items()},
        "version of llada": __version__,
    }


def _files(derived: Derived) -> list[Path]:
    return [path for source in derived.sources for path in source.files]


def _fill(workspace: Workspace, derived: Derived, tokenizer: dict[str, bytes], workers: int, title: str) -> None:
    """Check the sources, convert the weights, and write everything else that the target holds; the manifest is last."""
    step = workspace.output / _place(derived)
    step.mkdir(parents=True, exist_ok=True)
    workers = workers_for_files(workers, derived.layout.world_size, len(derived.sources))
    writes = [
        Task(
            number, partial(write_units, step, number, batch, derived.read, derived.model, derived.layout), writes=size
        )
        for number, (batch, size) in enumerate(batches(derived.dtypes, TASK_BYTES))
    ]
    stated = [(source, name) for source in derived.sources for name in source.reader.manifest.files]
    checks = [
        Task(number, partial(_check, source, name), reads=source.reader.manifest.files[name].size)
        for number, (source, name) in enumerate(stated, start=len(writes))
    ]
    # files are checked while others are written, which waits for the disk; nothing is published before both are done
    both = [task for pair in zip_longest(writes, checks) for task in pair if task is not None]
    records = run_tasks(workspace, both, workers, title)
    workspace.require_unchanged(_files(derived), whole_paths=True)
    _write_rest(workspace, derived, tokenizer)
    finalize(step, [record for record in records if record is not None], _metadata(workspace, derived, tokenizer))


def _check(source: ShardedSource, name: str, progress: ByteProgress) -> TaskResult:
    """One task: check that a file of a source holds the bytes that were written."""
    source.reader.verify(name, progress.advance)
    return TaskResult()


def _write_rest(workspace: Workspace, derived: Derived, tokenizer: dict[str, bytes]) -> None:
    write_durably(workspace.output / MODEL_FILE, dump_yaml(derived.model).encode())
    if tokenizer:
        folder = workspace.output / TOKENIZER
        folder.mkdir(exist_ok=True)
        for name, data in tokenizer.items():
            write_durably(folder / name, data)
        sync_directory(folder)


def _metadata(workspace: Workspace, derived: Derived, tokenizer: dict[str, bytes]) -> dict[str, Any]:
    """What the manifest says."""
    run, first = derived.run, derived.sources[0].metadata
    kept = {key: value for key, value in first.items() if key not in _OF_ONE_RUN}
    known = first.get("tokenizer")
    if known and tokenizer:
        known = known | {"path": str(workspace.target / TOKENIZER / Path(known["path"]).name)}
    return {
        **kept,
        "model": to_dict(derived.model),
        "run": to_dict(run),
        "step": derived.step,
        "layout": to_dict(run.layout),
        "tokenizer": known,
        "versions": {
            "llada-megatron": __version__,
            "torch": torch.__version__,
            "megatron-core": version("megatron-core"),
        },
        **derived.facts,
    }
