"""`llada bench convert`: memory and speed of both directions of a conversion, beside a plain copy of their input.

A disk's speed changes from minute to minute, so the input is copied before and after each conversion; every one of them
starts with nothing of it in the system's cache, and ends when the storage holds what was written.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.console import message
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.tools.bench import Claim, at_least, at_most, reported
from llada_megatron.tools.bench.measurement import CommandResult, run_command

if TYPE_CHECKING:
    import torch

    from llada_megatron.llada_moe.config.model import ModelConfig
    from llada_megatron.llada_moe.huggingface.safetensors_writer import ShardWriter

MEMORY_GOAL_GB, TIME_GOAL, SIZE_GOAL_GB = 2.0, 3.0, 8.0
_DISK_FACTOR = 4.1  # the source, both conversions of it, and a copy at a time
_POOL_ELEMENTS = 2**25
_SHARD_BYTES = 5 * 10**9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the benchmark."""
    parser.add_argument("--layers", type=int, default=6, help="of a LLaDA2-mini, some 1.6 GB each (default: 6, 9.4 GB)")
    parser.add_argument("--layout", help="import for these ranks, as in llada convert import --layout")
    parser.add_argument("--directory", default=".", help="on the disk to measure; four times the size must be free")


def run(args: argparse.Namespace) -> list[Claim]:
    """Write a synthetic checkpoint in the layout of LLaDA2, convert it there and back, and compare."""
    from llada_megatron.llada_moe.config import load_model
    from llada_megatron.llada_moe.model.parameters import count_parameters

    model = load_model("llada2-mini", [f"num_layers={args.layers}"])
    size = 2 * count_parameters(model).total
    with tempfile.TemporaryDirectory(prefix="llada-bench-convert-", dir=args.directory) as scratch:
        free = shutil.disk_usage(scratch).free
        if free < _DISK_FACTOR * size:
            raise ResourceError(
                f"{args.directory} has {free / 1e9:.0f} GB free of {_DISK_FACTOR * size / 1e9:.0f}: "
                "name another place with --directory, or fewer --layers"
            )
        return _measure(Path(scratch), model, size / 1e9, args.layout)


def _measure(scratch: Path, model: ModelConfig, gigabytes: float, layout: str | None) -> list[Claim]:
    source, sharded, exported = scratch / "source", scratch / "sharded", scratch / "exported"
    message(f"writing {gigabytes:.1f} GB of weights to {source}")
    write_synthetic(source, model)
    steps = [
        ("import", source, sharded, ["--layout", layout] if layout else []),
        ("export", sharded, exported, ["--without-tokenizer"]),
    ]
    claims = [at_least("size of the checkpoint", gigabytes, "GB", SIZE_GOAL_GB)]
    for action, before, after, options in steps:
        copies = [_copy(before, scratch / "copy")]
        _forget(before)
        done, _ = _command(action, before, after, *options)
        copies.append(_copy(before, scratch / "copy"))
        claims += _claims(action, done, copies, gigabytes)
    _, same = _command("verify", source, exported, "--no-logits")
    claims.append(at_most("tensors that differ after both directions", same["differing"], "", 0))
    return claims


def _claims(action: str, done: CommandResult, copies: list[float], gigabytes: float) -> list[Claim]:
    """One direction beside the copies of its input made before and after it."""
    ratio = done.seconds / statistics.mean(copies)
    return [
        at_most(f"{action}: peak memory of the process", done.peak_gb, "GB", MEMORY_GOAL_GB),
        at_most(f"{action}: time / time of a plain copy (mean of two)", ratio, "x", TIME_GOAL),
        reported(f"{action}: throughput", 1000 * gigabytes / done.seconds, "MB/s"),
        *(
            reported(f"plain copy {when} the {action}: throughput", 1000 * gigabytes / seconds, "MB/s")
            for when, seconds in zip(("before", "after"), copies, strict=True)
        ),
    ]


def write_synthetic(directory: Path, model: ModelConfig) -> None:
    """A checkpoint of `model` with bf16 weights of arbitrary bits that are numbers, as published: shards and index."""
    import torch

    from llada_megatron.llada_moe.huggingface.formats import export_format
    from llada_megatron.llada_moe.huggingface.formats.table import write_config
    from llada_megatron.llada_moe.huggingface.mapping import tensor_shapes
    from llada_megatron.llada_moe.huggingface.safetensors_writer import ShardWriter, shard_name, write_index

    table = export_format(model)
    directory.mkdir()
    pool = torch.randn(_POOL_ELEMENTS, generator=torch.Generator().manual_seed(0)).bfloat16()
    shards: list[list[tuple[str, torch.dtype, tuple[int, ...]]]] = [[]]
    held = 0
    for name, shape in tensor_shapes(table, model).items():
        dtype = torch.float32 if name.endswith("expert_bias") else torch.bfloat16
        size = torch.Size(shape).numel() * dtype.itemsize
        if held + size > _SHARD_BYTES:
            shards.append([])
            held = 0
        held += size
        shards[-1].append((name, dtype, shape))
    places = {}
    for number, tensors in enumerate(shards, start=1):
        path = directory / shard_name(number, len(shards))
        with ShardWriter(path, tensors) as writer:
            for index, (name, dtype, shape) in enumerate(tensors):
                _append_from(writer, pool, index, dtype, shape)
                places[name] = path.name
    write_index(directory, places, sum(path.stat().st_size for path in directory.iterdir()))
    (directory / "config.json").write_text(json.dumps(write_config(table, model)))


def _append_from(
    writer: ShardWriter, pool: torch.Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Fill the next tensor with values of the pool, from another place of it for each tensor."""
    rows, width = shape[0], math.prod(shape[1:])
    most = max(1, _POOL_ELEMENTS // 2 // width)
    start = start * 4099 % (_POOL_ELEMENTS // 2)
    for first in range(0, rows, most):
        count = min(most, rows - first)
        writer.append(pool[start : start + count * width].reshape(count, *shape[1:]).to(dtype))


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _forget(directory: Path) -> None:
    """Make the system drop its cached pages of the files, so that everything measured reads from the disk."""
    for path in _files(directory):
        with path.open("rb") as stream:
            if hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _copy(source: Path, target: Path) -> float:
    """Seconds to copy a directory's files and wait for the storage, as a conversion does. The copy is removed."""
    _forget(source)
    target.mkdir()
    begin = time.perf_counter()
    for number, path in enumerate(_files(source)):
        shutil.copyfile(path, target / str(number))
        with (target / str(number)).open("rb+") as stream:
            os.fsync(stream.fileno())
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds


def _command(action: str, *arguments: str | Path) -> tuple[CommandResult, dict[str, Any]]:
    """Run `llada convert` as a user does, in a process of its own; also the JSON object that it printed last."""
    done = run_command([sys.executable, "-m", "llada_megatron.cli", "convert", action, *map(str, arguments), "--json"])
    result = json.loads(done.output.splitlines()[-1]) if done.output else {}
    if done.status and "equal" not in result:
        raise ResourceError(f"llada convert {action} ended with {done.status}: {result.get('error', 'see above')}")
    return done, result
