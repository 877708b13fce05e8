"""What can be seen of a disturbed run from outside: its files, and the processes of its job."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.private_slurm import PrivateSlurm
from llada_megatron.llada_moe.errors import CheckpointError, LladaError
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.training.metrics_file import read_metrics

AGENT, RANK = "llada_megatron.launch.cluster.agent", "llada_megatron.launch.cluster.agent.job_rank"
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "")
"""States in which SLURM leaves a job alone for good (the last: it no longer knows the job)."""

CURVE = ("step", "loss", "grad_norm", "learning_rate", "consumed_sequences")
"""Keys of the metrics whose values depend neither on the clock nor on the machine."""


def curve(output_dir: Path) -> list[dict[str, Any]]:
    """The loss curve: the values of `CURVE`, one row a step."""
    return [{key: line[key] for key in CURVE if key in line} for line in read_metrics(output_dir) if "loss" in line]


def seconds_lost(output_dir: Path) -> list[float]:
    """Seconds that each save took from training, of the steps that the metrics still hold."""
    return [line["checkpoint/seconds_lost"] for line in read_metrics(output_dir) if "checkpoint/seconds_lost" in line]


def last_step(output_dir: Path) -> int:
    """The newest step in the metrics; 0 before the first."""
    return max((line["step"] for line in read_metrics(output_dir)), default=0)


def newest_whole(output_dir: Path) -> int:
    """Step of the newest checkpoint whose every byte is as its manifest says; 0 = none."""
    for step, path in manifests.steps(output_dir / "checkpoints"):
        with contextlib.suppress(CheckpointError, OSError):  # damaged, or being removed
            manifest = manifests.read(path)
            manifests.verify_sizes(path, manifest)
            if not any(manifests.verify_digest(path, name, record) for name, record in manifest.files.items()):
                return step
    return 0


def events(job: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The events that the nodes of a job recorded, in order of time; lines that are still being written are skipped."""
    found = []
    for path in (job / "events").glob("*.jsonl"):
        for text in path.read_text("utf-8").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(text))
    return sorted((each for each in found if kind in (None, each["event"])), key=lambda each: each["time"])


def output_size(job: Path) -> int:
    """Bytes of the job's output so far."""
    path = job / "job.out"
    return path.stat().st_size if path.exists() else 0


def continued_from(job: Path, offset: int) -> list[int]:
    """The steps that ranks reported to continue from, in the job's output beyond `offset` bytes."""
    text = (job / "job.out").read_bytes()[offset:].decode(errors="replace")
    return [int(found[1]) for found in re.finditer(r"continuing from \S+ at step (\d+)", text)]


def noted_steps(job: Path) -> int:
    """How many steps were not finite, according to the job's output."""
    text = (job / "job.out").read_text(errors="replace")
    return len(set(re.findall(r"^recovery: .* step (\d+) is not finite", text, re.MULTILINE)))


def ranks(slurm: PrivateSlurm, node: str | None = None) -> list[psutil.Process]:
    """The ranks themselves, without the processes that they forked."""
    found = slurm.processes(RANK, node)
    ids = {process.pid for process in found}
    alone = []
    for process in found:
        with contextlib.suppress(psutil.Error):
            if process.ppid() not in ids:
                alone.append(process)
    return alone


def wait_until(ready: Callable[[], Any], what: str, limit_s: float = 300, pause_s: float = 0.1) -> Any:
    """The first true value of `ready()`.

    Raises:
        LladaError: none within `limit_s`.
    """
    deadline = time.monotonic() + limit_s
    while not (value := ready()):
        if time.monotonic() > deadline:
            raise LladaError(f"no sign of {what} within {limit_s:g} s")
        time.sleep(pause_s)
    return value


def wait_for_step(output_dir: Path, step: int, limit_s: float = 300) -> int:
    """Wait until the metrics hold `step` or a later one; returns the newest."""
    newest = 0

    def reached() -> bool:
        nonlocal newest
        newest = last_step(output_dir)
        return newest >= step

    wait_until(reached, f"step {step} in {output_dir}", limit_s, 0.02)
    return newest


def different_tensors(one: Path, other: Path) -> list[str]:
    """Names of the tensors that are not the same to the last bit in two checkpoints (optimizer state included)."""
    from llada_megatron.parallel.ranks import run_ranks

    return run_ranks(_different, 1, str(one), str(other))[0]


def final_checkpoint(output_dir: Path) -> Path:
    """The newest checkpoint of a finished run."""
    return manifests.steps(output_dir / "checkpoints")[0][1]


def _different(one: str, other: str) -> list[str]:
    import torch
    from megatron.core import dist_checkpointing

    first, second = dist_checkpointing.load_plain_tensors(one), dist_checkpointing.load_plain_tensors(other)
    names = {name for both in (first, second) for name, value in both.items() if isinstance(value, torch.Tensor)}
    return sorted(
        name for name in names if name not in first or name not in second or not _same(first[name], second[name])
    )


def _same(one: Any, other: Any) -> bool:
    import torch

    return torch.is_tensor(one) and torch.is_tensor(other) and one.dtype == other.dtype and torch.equal(one, other)
