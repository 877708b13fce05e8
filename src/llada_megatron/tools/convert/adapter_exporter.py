"""`llada convert export --adapter`: the low-rank factors of a run alone, as PEFT keeps a LoRA adapter.

PEFT has an adapter for each module of the Hugging Face model. A layer that is one here and several there (query, key
and value; gate and up) becomes several adapters with the same A, each with its rows of B.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llada_megatron import __version__
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError
from llada_megatron.llada_moe.finite import is_finite
from llada_megatron.llada_moe.huggingface.formats import export_format
from llada_megatron.llada_moe.huggingface.formats.table import Format
from llada_megatron.llada_moe.huggingface.mapping import mappings, split, tensor_shapes
from llada_megatron.llada_moe.huggingface.safetensors_writer import ShardWriter
from llada_megatron.parallel.checkpoint.manifest import write_durably
from llada_megatron.tools.convert.sharded_source import ShardedSource, factor_key
from llada_megatron.tools.convert.source import parameters_by_dtype
from llada_megatron.tools.convert.tasks import ByteProgress, Task, TaskResult, run_tasks
from llada_megatron.tools.convert.workspace import FILES, Workspace, file_states
from llada_megatron.tools.convert.wrapped_names import ADAPTER_CONFIG

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def export_adapter(
    path: Path, target: Path, base: str | None, dtype: torch.dtype | None, workers: int
) -> dict[str, Any]:
    """Write the factors of a sharded checkpoint to the directory `target`.

    Args:
        base: name or path of the model that the adapter belongs to; None = what the run's was imported from.
        dtype: of the written factors; None = as they are stored.

    Returns:
        a summary as `export_checkpoint` gives.

    Raises:
        CheckpointError: the checkpoint is damaged, its model has no published format, or a factor is no finite number.
        ConfigError: the run had no factors, or the target is not empty.
        ResourceError: no space is left.
    """
    source = ShardedSource(path)
    if source.lora is None:
        raise ConfigError(
            f"{source.directory} was trained without training.lora and holds no adapter; leave out --adapter"
        )
    table = export_format(source.model)
    notes = source.require_whole()
    base = base or origin(source)
    if base is None:
        notes.append("the base model is not known; name it with --base-model, or give it to peft when loading")
    tensors = adapter_tensors(source, table, dtype)
    config = adapter_config(source, table, base)
    plan = {
        "direction": "export of an adapter",
        "checkpoint": str(source.directory),
        FILES: file_states(source.files),
        "--base-model": base,
        "--dtype": str(dtype),
        "version of llada": __version__,
    }
    size = sum(tensor.nbytes for tensor in tensors.values())
    with Workspace(target, plan) as workspace:
        if not workspace.complete:
            checks = [
                Task(number, partial(_check, name, source), reads=stated.size)
                for number, (name, stated) in enumerate(source.reader.manifest.files.items(), start=1)
            ]
            write = Task(0, partial(_write, workspace.output / WEIGHTS, tensors), writes=size)
            run_tasks(workspace, [write, *checks], workers, "checking and exporting")
            write_durably(workspace.output / ADAPTER_CONFIG, (json.dumps(config, indent=2) + "\n").encode())
        workspace.publish()
    return {
        "format": f"LoRA adapter for {table.name}, rank {source.lora.rank}",
        "directory": str(target),
        "tensors": len(tensors),
        "parameters": sum(
            parameters_by_dtype((tensor.dtype, tuple(tensor.shape)) for tensor in tensors.values()).values()
        ),
        "bytes": size,
        "notes": notes,
    }


def adapter_tensors(source: ShardedSource, table: Format, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """PEFT's names and tensors: `….lora_A.weight` `[rank, input]` and `….lora_B.weight` `[output, rank]`.

    Raises:
        CheckpointError: a factor is no finite number.
    """
    found: dict[str, list[torch.Tensor]] = {}
    for mapping in mappings(table, source.model):
        unit = mapping.unit
        if not source.has_factors(unit.weight):
            continue
        a, b = (_read(source, factor_key(unit.weight, name), unit.index, dtype) for name in ("lora_A", "lora_B"))
        rows = split(mapping, b[unit.start : unit.stop], source.model)
        for part, piece in zip(mapping.parts, rows, strict=True):
            module = _PREFIX + part.name.removesuffix(".weight")
            found[f"{module}.lora_A.weight"] = [a]
            found.setdefault(f"{module}.lora_B.weight", []).append(piece)
    return {name: torch.cat(pieces) for name, pieces in sorted(found.items())}


def _read(source: ShardedSource, key: str, index: tuple[int, ...], dtype: torch.dtype | None) -> torch.Tensor:
    tensor = source.reader.read(key, index)
    if not is_finite(tensor):
        raise CheckpointError(
            f"{source.directory}: {key} is not everywhere a finite number: the training had diverged; take an earlier "
            "checkpoint"
        )
    return tensor if dtype is None else tensor.to(dtype)


def adapter_config(source: ShardedSource, table: Format, base: str | None) -> dict[str, Any]:
    """PEFT's `adapter_config.json`."""
    lora = source.lora
    assert lora is not None
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "revision": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "lora_dropout": 0.0,
        "target_modules": target_modules(source, table),
        "modules_to_save": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def target_modules(source: ShardedSource, table: Format) -> list[str]:
    """The adapted modules as PEFT finds them: by the last part of their names where that means no other module."""
    adapted = {
        part.name.removesuffix(".weight")
        for mapping in mappings(table, source.model)
        if source.has_factors(mapping.unit.weight)
        for part in mapping.parts
    }
    ends = {name.rpartition(".")[2] for name in adapted}
    all_modules = (name.removesuffix(".weight") for name in tensor_shapes(table, source.model))
    meant = {name for name in all_modules if name.rpartition(".")[2] in ends}
    return sorted(ends if meant == adapted else adapted)


def origin(source: ShardedSource) -> str | None:
    """What the model that the factors stand beside was imported from; None where it is no import, or not there any
    more. A run may have begun with the factors of another, and they with the model of that one."""
    while (load := source.run.checkpoint.load) is not None:
        try:
            source = ShardedSource(Path(load))
        except CheckpointError:
            return None
        if source.lora is None:
            imported = source.metadata.get("imported")
            return str(imported["from"]) if imported else None
    return None


def _write(path: Path, tensors: dict[str, torch.Tensor], progress: ByteProgress) -> TaskResult:
    """One task: write the factors."""
    with ShardWriter(path, [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]) as writer:
        for tensor in tensors.values():
            writer.append(tensor)
            progress.advance(tensor.nbytes)
    return TaskResult(files=(path,))


def _check(name: str, source: ShardedSource, progress: ByteProgress) -> TaskResult:
    """One task: check that a file of the checkpoint holds the bytes that were written."""
    source.reader.verify(name, progress.advance)
    return TaskResult()
