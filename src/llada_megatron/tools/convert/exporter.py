"""`llada convert export`: a directory that transformers loads, from a sharded checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from llada_megatron import __version__
from llada_megatron.console import message, size_text
from llada_megatron.llada_moe.data.tokenizer_files import require_tokenizer
from llada_megatron.llada_moe.errors import DataError
from llada_megatron.llada_moe.huggingface.card import generation_config, model_card
from llada_megatron.llada_moe.huggingface.formats import export_format, modeling_files
from llada_megatron.llada_moe.huggingface.formats.table import Format, write_config
from llada_megatron.llada_moe.huggingface.mapping import Mapping, mappings, split
from llada_megatron.llada_moe.huggingface.safetensors_reader import SINGLE_NAME
from llada_megatron.llada_moe.huggingface.safetensors_writer import ShardWriter, shard_name, write_index
from llada_megatron.llada_moe.huggingface.tokenizer_export import TokenizerFiles, tokenizer_files
from llada_megatron.llada_moe.objectives import make_objective
from llada_megatron.parallel.checkpoint.manifest import write_durably
from llada_megatron.parallel.checkpoint.search import find_checkpoints, tokenizer_place
from llada_megatron.parallel.sampling.checkpoint_tokenizer import find_tokenizer, ids_without_token
from llada_megatron.tools.convert.huggingface_source import CONFIG, GENERATION_CONFIG
from llada_megatron.tools.convert.sharded_source import ShardedSource
from llada_megatron.tools.convert.source import kept_dtype, parameters_by_dtype, require_finite
from llada_megatron.tools.convert.tasks import ByteProgress, Task, TaskResult, run_tasks
from llada_megatron.tools.convert.workspace import FILES, Workspace, file_states, unfinished_plan


@dataclass
class Shard:
    """One safetensors file of the export."""

    mappings: list[Mapping] = field(default_factory=list)
    """The units that fill it, in order."""
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(default_factory=dict)
    """dtype and shape by name, in order."""
    size: int = 0
    """Bytes of the tensors."""


def plan_shards(source: ShardedSource, table: Format, wanted: torch.dtype | None, shard_bytes: int) -> list[Shard]:
    """The files to write, with the tensors in the order of the forward pass.

    A file holds at most `shard_bytes` of tensors, unless a single tensor, or those that one unit fills, are larger:
    these are not divided among files.

    Args:
        wanted: dtype of the weights; None = as they are stored.
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
    """A note if there are files larger than `shard_bytes`."""
    larger = [shard.size for shard in shards if shard.size > shard_bytes]
    if not larger:
        return []
    count = f"{len(larger)} files exceed" if len(larger) > 1 else "1 file exceeds"
    return [
        f"{count} --shard-size, by up to {size_text(max(larger) - shard_bytes)}: no tensor is cut, and "
        "projections that are converted together stay together"
    ]


def _whole_tensors(table: Format, source: ShardedSource) -> Iterator[list[Mapping]]:
    """The mappings in groups: one, or all those that fill one large tensor in blocks of rows."""
    group: list[Mapping] = []
    for mapping in mappings(table, source.model):
        if group and mapping.parts[0].start == 0:
            yield group
            group = []
        group.append(mapping)
    yield group


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Options of an export."""

    dtype: torch.dtype | None = None
    """dtype of the written weights; None = as they are stored."""
    shard_bytes: int = 5 * 10**9
    """Most bytes of tensors per file."""
    tokenizer: Path | None = None
    """Where the tokenizer is; None = where the checkpoint says."""
    without_tokenizer: bool = False
    """Export none; False = refuse to export where there is none."""
    workers: int = 1


def export_checkpoint(path: Path, target: Path, options: ExportOptions) -> dict[str, Any]:
    """Convert a sharded checkpoint to a Hugging Face directory `target`, with everything that is needed to load it.

    Returns:
        a summary: name of the format, number of tensors and parameters, bytes, the directory, notes.

    Raises:
        CheckpointError: the checkpoint is damaged, its model has no published format, or a weight is no finite number.
        ConfigError: the target is not empty.
        DataError: there is no tokenizer, it cannot be read, or it is not the one that the checkpoint was trained with.
        ResourceError: no space is left; the same command continues once there is some.
    """
    source = ShardedSource(_begun_from(path, target) or path)
    table = export_format(source.model)
    config = write_config(table, source.model)
    notes = source.require_whole()
    tokenizer = _tokenizer(source, options)
    notes += tokenizer.notes
    shards = plan_shards(source, table, options.dtype, options.shard_bytes)
    notes += size_notes(shards, options.shard_bytes)
    objective = make_objective(source.objective)
    if objective.verifies:
        notes.append(
            "these weights draft behind a text that is read causally: `generate` of the export refuses, a causal mask "
            "gives the next token (README.md), and an import of it samples with --preset self-speculation"
        )
    if not objective.fills_masks:
        notes.append("these weights were trained with causal attention; the exported model attends in both directions")
    with Workspace(target, _plan(source, tokenizer, options)) as workspace:
        if not workspace.complete:
            _fill(workspace, source, shards, options.workers)
            config["torch_dtype"] = _main_dtype(shards)
            _write_rest(workspace.output, source, table, config, tokenizer, _unused_ids(source, options))
        workspace.publish()
    return {
        "format": table.name,
        "directory": str(target),
        "tensors": sum(len(shard.tensors) for shard in shards),
        "parameters": sum(torch.Size(shape).numel() for shard in shards for _, shape in shard.tensors.values()),
        "bytes": sum(shard.size for shard in shards),
        "notes": notes,
    }


def _tokenizer(source: ShardedSource, options: ExportOptions) -> TokenizerFiles:
    """The tokenizer's files. Raises DataError: there is none, or it is not the one of the training."""
    if options.without_tokenizer:
        return TokenizerFiles()
    path = options.tokenizer or source.tokenizer
    if path is None:
        place = tokenizer_place(source.directory, source.metadata)
        problem = f"is not at {place}" if place else "is not known: it was imported without one"
        raise DataError(
            f"{source.directory}: its tokenizer {problem}; say where it is with --tokenizer PATH, or export the "
            "weights alone with --without-tokenizer"
        )
    if path.exists():
        require_tokenizer(path, source.metadata.get("tokenizer"), source.directory)
    return tokenizer_files(path, source.model)


def _unused_ids(source: ShardedSource, options: ExportOptions) -> list[int]:
    """Ids that the tokenizer has no token for, and that are never sampled; none where no tokenizer can tell."""
    if options.without_tokenizer:
        return []
    path = str(options.tokenizer) if options.tokenizer else None
    try:
        tokenizer = find_tokenizer(source.directory, source.metadata, source.model, path)
    except DataError:  # its files are exported as they are, but ours cannot read them
        return []
    return ids_without_token(tokenizer, source.model.vocab_size)


def _begun_from(path: Path, target: Path) -> Path | None:
    """The checkpoint of the run `path` that an unfinished export to `target` reads, if newer ones have come since."""
    plan = unfinished_plan(target)
    if plan.get("direction") != "export":
        return None
    candidates = [candidate.absolute() for candidate in find_checkpoints(path)]
    begun = next((candidate for candidate in candidates[1:] if str(candidate) == plan["checkpoint"]), None)
    if begun is not None:
        message(f"the unfinished export to {target} goes on with {begun.name}, although {path} has newer checkpoints")
    return begun


def _plan(source: ShardedSource, tokenizer: TokenizerFiles, options: ExportOptions) -> dict[str, Any]:
    """Everything that decides the bytes of the output; the keys are shown when an unfinished export differs."""
    return {
        "direction": "export",
        "checkpoint": str(source.directory),
        FILES: file_states(source.files),
        "checkpoint's digests": {name: stated.sha256 for name, stated in source.reader.manifest.files.items()},
        "checkpoint's facts": source.metadata,
        "tokenizer": {name: hashlib.sha256(data).hexdigest() for name, data in tokenizer.files.items()},
        "--dtype": str(options.dtype),
        "--shard-size": options.shard_bytes,
        "version of llada": __version__,
    }


def _fill(workspace: Workspace, source: ShardedSource, shards: list[Shard], workers: int) -> None:
    """Check the checkpoint's files, and write the weights and their index."""
    names = [shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [SINGLE_NAME]

    writes = [
        Task(number, partial(_write_shard, workspace.output / name, shard, source), writes=shard.size)
        for number, (name, shard) in enumerate(zip(names, shards, strict=True))
    ]
    checks = [
        Task(number, partial(_check, name, source), reads=stated.size)
        for number, (name, stated) in enumerate(source.reader.manifest.files.items(), start=len(shards))
    ]
    # files are checked while others are written, which waits for the disk; nothing is published before both are done
    both = [task for pair in zip_longest(writes, checks) for task in pair if task is not None]
    run_tasks(workspace, both, workers, "checking and exporting")
    workspace.require_unchanged(source.files)
    if len(shards) > 1:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard.tensors}
        write_index(workspace.output, places, sum(shard.size for shard in shards))


def _write_shard(path: Path, shard: Shard, source: ShardedSource, progress: ByteProgress) -> TaskResult:
    """One task: write one file of the export."""
    listed = [(name, dtype, shape) for name, (dtype, shape) in shard.tensors.items()]
    with ShardWriter(path, listed) as writer:
        for mapping in shard.mappings:
            tensor = source.read(mapping.unit, shard.tensors[mapping.parts[0].name][0])
            require_finite(source, mapping.unit, tensor)
            for part in split(mapping, tensor, source.model):
                writer.append(part)
            progress.advance(tensor.nbytes)
    return TaskResult(files=(path,))


def _check(name: str, source: ShardedSource, progress: ByteProgress) -> TaskResult:
    """One task: check that a file of the checkpoint holds the bytes that were written."""
    source.reader.verify(name, progress.advance)
    return TaskResult()


def _main_dtype(shards: list[Shard]) -> str:
    """The dtype of most parameters, as `config.json` names it."""
    counts = parameters_by_dtype(tensor for shard in shards for tensor in shard.tensors.values())
    return max(counts, key=lambda dtype: counts[dtype])


def _write_rest(
    output: Path,
    source: ShardedSource,
    table: Format,
    config: dict[str, Any],
    tokenizer: TokenizerFiles,
    unused: list[int],
) -> None:
    """Write everything but the weights. The configuration is written last, because nothing loads without it.

    Args:
        unused: ids that the tokenizer has no token for.
    """
    assert table.exports is not None
    for file in modeling_files(table.exports.folder):
        write_durably(output / file.name, file.read_bytes())
    for name, data in tokenizer.files.items():
        write_durably(output / name, data)
    sampling = generation_config(source.model, source.objective, unused)
    write_durably(output / GENERATION_CONFIG, _json(sampling))
    write_durably(output / "README.md", model_card(source.model, table, source.metadata, tokenizer.loadable).encode())
    write_durably(output / CONFIG, _json(dict(sorted(config.items()))))


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
