"""`llada convert import`: a sharded checkpoint from a Hugging Face one, unit by unit."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from llada_megatron import __version__
from llada_megatron.llada_moe.config import dump_yaml, to_dict
from llada_megatron.llada_moe.config.data import DataConfig
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.huggingface import weights
from llada_megatron.llada_moe.huggingface.hub_cache import repository_name
from llada_megatron.llada_moe.huggingface.weights import Unit
from llada_megatron.parallel.checkpoint.conversion.shard_writer import finalize
from llada_megatron.parallel.checkpoint.manifest import step_name, write_durably
from llada_megatron.parallel.checkpoint.search import TOKENIZER
from llada_megatron.tools.convert.huggingface_source import (
    USABLE_DTYPES,
    HuggingFaceSource,
    KeptTokenizer,
    keep_tokenizer,
)
from llada_megatron.tools.convert.mask_token import mask_notes
from llada_megatron.tools.convert.source import kept_dtype, require_finite
from llada_megatron.tools.convert.tasks import Task, run_tasks, workers_for_files
from llada_megatron.tools.convert.unit_tasks import batches, require_layout, write_units
from llada_megatron.tools.convert.workspace import FILES, Workspace, file_states

TASK_BYTES = 2**30
"""About how much one task converts; after an interruption at most this much is repeated for each worker."""

STEP = Path("checkpoints") / step_name(0)

MODEL_FILE = "model.yaml"


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Options of an import."""

    layout: LayoutConfig
    dtype: torch.dtype | None = None
    """dtype of the written weights; None = as they are stored."""
    mask_token_id: int | None = None
    workers: int = 1


def import_checkpoint(directory: Path, target: Path, options: ImportOptions) -> dict[str, Any]:
    """Convert the checkpoint in `directory` to a sharded one in `target`.

    Returns:
        a summary: name of the format, number of tensors and parameters, bytes, path of the checkpoint, notes.

    Raises:
        CheckpointError: the source is incomplete, damaged, or of an unknown format, or a weight is no finite number.
        ConfigError: the model cannot be cut for the layout, the target is not empty, or the tokenizer and the
            configuration name different mask tokens and no option decides.
        DataError: a file of the tokenizer is a link that leads out of the directory.
        ResourceError: no space is left; the same command continues once there is some.
    """
    tokenizer = keep_tokenizer(directory)
    source = HuggingFaceSource(directory, options.mask_token_id)
    try:
        notes = source.require_whole() + mask_notes(source, tokenizer, options.mask_token_id)
        dtypes = _dtypes(source, options.dtype)
        run = _run(source, options.layout, dtypes)
        require_layout(run.model, run.layout)
        with Workspace(target, _plan(source, tokenizer, options)) as workspace:
            if not workspace.complete:
                _fill(workspace, source, tokenizer, run, dtypes, options.workers)
            workspace.publish()
    finally:
        source.close()
    return {
        "format": source.format.name,
        "checkpoint": str(target / STEP),
        "tensors": len({part.name for mapping in source.mappings for part in mapping.parts}),
        "parameters": sum(unit.elements for unit in dtypes),
        "bytes": sum(unit.elements * dtype.itemsize for unit, dtype in dtypes.items()),
        "notes": notes + tokenizer.notes,
    }


def _dtypes(source: HuggingFaceSource, wanted: torch.dtype | None) -> dict[Unit, torch.dtype]:
    """The dtype to write each unit in. Raises CheckpointError: no model can be trained or run in one of them."""
    found: dict[Unit, torch.dtype] = {}
    by_weight: dict[str, tuple[torch.dtype, str]] = {}
    for mapping in source.mappings:
        key = mapping.unit.weight.key
        for part in mapping.parts:
            stored = source.tensors.tensors[part.name].dtype
            dtype = kept_dtype(mapping.unit, stored, wanted)
            if dtype not in USABLE_DTYPES or not stored.is_floating_point or stored.itemsize < 2:
                raise CheckpointError(
                    f"{source.directory}: {part.name} is {stored}; bfloat16 and float32 are kept as they are, "
                    "float16 and float64 are converted with --dtype bf16 or fp32, quantised weights are not read"
                )
            first, name = by_weight.setdefault(key, (dtype, part.name))
            if dtype is not first:
                raise CheckpointError(
                    f"{source.directory}: {name} is {first} and {part.name} is {dtype}, but both become parts of "
                    f"{key}: give --dtype bf16 or fp32"
                )
        found[mapping.unit] = by_weight[key][0]
    return found


def _run(source: HuggingFaceSource, layout: LayoutConfig, dtypes: dict[Unit, torch.dtype]) -> RunConfig:
    """The configuration of a run of no steps, which the manifest of the checkpoint describes."""
    projection = next(dtype for unit, dtype in dtypes.items() if unit.weight.pattern == weights.QKV)
    return RunConfig(
        model=source.model,
        objective=source.objective,
        training=TrainingConfig(
            steps=0,
            sequence_length=source.model.max_sequence_length,
            global_batch_size=1,
            precision="fp32" if projection is torch.float32 else "bf16",
        ),
        data=DataConfig(sets=[]),
        optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=0.0)),
        output_dir="",
        layout=layout,
    )


def _plan(source: HuggingFaceSource, tokenizer: KeptTokenizer, options: ImportOptions) -> dict[str, Any]:
    """Everything that decides the bytes of the output; the keys are shown when an unfinished import differs."""
    return {
        "direction": "import",
        "source": str(source.directory.resolve()),
        FILES: file_states(source.tensors.files),
        "source's configuration": source.config_sha256,
        "source's objective": to_dict(source.objective),
        "source's tokenizer": {name: hashlib.sha256(data).hexdigest() for name, data in tokenizer.files.items()},
        "--layout": to_dict(options.layout),
        "--dtype": str(options.dtype),
        "--mask-token-id": options.mask_token_id,
        "version of llada": __version__,
    }


def _fill(
    workspace: Workspace,
    source: HuggingFaceSource,
    tokenizer: KeptTokenizer,
    run: RunConfig,
    dtypes: dict[Unit, torch.dtype],
    workers: int,
) -> None:
    """Convert the weights, and write everything else that the target holds; the manifest is last."""
    step = workspace.output / STEP
    step.mkdir(parents=True, exist_ok=True)

    workers = workers_for_files(workers, run.layout.world_size, len(source.tensors.files))

    def read(unit: Unit) -> torch.Tensor:
        tensor = source.read(unit, dtypes[unit])
        require_finite(source, unit, tensor)
        return tensor

    tasks = [
        Task(number, partial(write_units, step, number, batch, read, run.model, run.layout), writes=size)
        for number, (batch, size) in enumerate(batches(dtypes, TASK_BYTES))
    ]
    records = run_tasks(workspace, tasks, workers, "importing")
    workspace.require_unchanged(source.tensors.files)
    write_durably(workspace.output / MODEL_FILE, dump_yaml(run.model).encode())
    tokenizer.write(workspace.output / TOKENIZER)
    finalize(step, records, _metadata(source, run) | {"tokenizer": tokenizer.metadata(workspace.target / TOKENIZER)})


def _metadata(source: HuggingFaceSource, run: RunConfig) -> dict[str, Any]:
    """What the manifest says of the run, except for the tokenizer."""
    return {
        "model": to_dict(run.model),
        "run": to_dict(run),
        "step": 0,
        "consumed_samples": 0,
        "layout": to_dict(run.layout),
        "versions": {
            "llada-megatron": __version__,
            "torch": torch.__version__,
            "megatron-core": version("megatron-core"),
        },
        "imported": {
            "format": source.format.name,
            "from": repository_name(source.directory),
            "config_sha256": source.config_sha256,
        },
    }
