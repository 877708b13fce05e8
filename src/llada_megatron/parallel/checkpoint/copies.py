"""Copies of a run's checkpoints on other storage, made in the background while training goes on.

The files are divided among the ranks; each rank starts a process that copies and verifies its share (copier.py). When
all have finished, rank 0 publishes the copy by the same rules as a checkpoint. All methods are collective. A failure is
reported, never raised: training does not need the copy.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import distributed as dist

from llada_megatron.llada_moe.errors import LladaError, ResourceError
from llada_megatron.parallel import host_group
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.checkpoint.retention import Retention, fault, remove
from llada_megatron.parallel.collectives import agree, explain, on_rank_0

_POLL_S = 0.2


@dataclass(frozen=True)
class _Order:
    """What is to be copied, as rank 0 read it; if the checkpoint is replaced meanwhile, the copy fails."""

    source: Path
    partial: Path
    step: int
    manifest: bytes
    files: list[tuple[str, int, str]]
    """Name, size in bytes and SHA-256 of each file, the largest first."""


class Copies:
    """A second directory of a run's checkpoints."""

    def __init__(self, retention: Retention, report: Callable[[str], None]) -> None:
        """`report` receives one-line messages, on rank 0 only."""
        self._retention, self._report = retention, report
        self._waiting: Path | None = None
        self._order: _Order | None = None
        self._copier: subprocess.Popen[str] | None = None

    @property
    def protected(self) -> list[str]:
        """Names of the step directories that are being copied or wait for it, and must not be removed."""
        return [path.name for path in (self._order and self._order.source, self._waiting) if path]

    def add(self, checkpoint: Path) -> None:
        """Copy a completed checkpoint once the current copy is done; only the newest of those that wait is kept."""
        if self._waiting is not None:
            self._say(f"{self._waiting.name} is not copied to {self._retention.path}: copying is slower than saving")
        self._waiting = checkpoint
        self._start_next()

    def catch_up(self, checkpoint: Path) -> None:
        """Copy the checkpoint that the run goes on from, unless its copy is there."""
        copy = self._retention.path / checkpoint.name
        if checkpoint != copy and on_rank_0(lambda: fault(copy)):
            self.add(checkpoint)

    def poll(self) -> None:
        """Publish the copy if every rank has copied its share."""
        if self._order is None:
            return
        done = torch.tensor(int(self._copier is None or self._copier.poll() is not None))
        host_group.world().all_reduce(done, dist.ReduceOp.MIN)
        if done:
            self._end_current()
            self._start_next()

    def finish(self, stop: Callable[[], bool]) -> None:
        """Wait until everything is copied, or until `stop`, which is called now and then, returns true on any rank."""
        reported = False
        while self._order is not None:
            stop_requested = torch.tensor(int(stop()))
            host_group.world().all_reduce(stop_requested)
            if stop_requested:
                self._abandon(self._order)
                return
            if not reported:
                self._say(f"waiting for the copy in {self._retention.path}")
                reported = True
            self.poll()
            time.sleep(_POLL_S)

    def _abandon(self, order: _Order) -> None:
        """End the copying at once; `catch_up` at the next start of the run copies the checkpoint again."""
        if self._copier is not None:
            self._copier.kill()
            self._copier.wait()
        self._order = self._copier = self._waiting = None
        dist.barrier()
        self._discard(order)
        self._say(f"the copy of {order.source.name} was broken off; the next start makes it")

    def _start_next(self) -> None:
        if self._order is not None or self._waiting is None:
            return
        checkpoint, self._waiting = self._waiting, None
        try:
            self._order = order = on_rank_0(lambda: self._prepare(checkpoint))
        except LladaError as error:
            self._failed(checkpoint, error)
            return
        share = order.files[dist.get_rank() :: dist.get_world_size()]
        files = {name: (size, sha256) for name, size, sha256 in share}
        places = {"source": str(order.source), "target": str(order.partial)}
        self._copier = _start_copier({"parent": os.getpid(), "files": files, **places})

    def _prepare(self, checkpoint: Path) -> _Order:
        """On rank 0: read the manifest, check that the copy fits on the disk, and make the directory for it."""
        manifest = manifests.read(checkpoint)
        files = [(name, *astuple(stated)) for name, stated in manifest.files.items()]
        files.sort(key=lambda file: (-file[1], file[0]))
        step, needed = int(checkpoint.name.rpartition("-")[2]), sum(size for _, size, _ in files)
        partial = self._retention.make_partial(step)
        free = shutil.disk_usage(partial).free
        if free < needed:
            remove(partial)
            raise ResourceError(f"it needs {needed / 1e9:.3f} GB and {free / 1e9:.3f} GB are free")
        return _Order(checkpoint, partial, step, (checkpoint / manifests.FILE_NAME).read_bytes(), files)

    def _end_current(self) -> None:
        order, self._order = self._order, None
        copier, self._copier = self._copier, None
        try:
            agree(_outcome(copier))
            path = on_rank_0(lambda: self._publish(order))
            self._say(f"{path.name} copied to {path.parent}")
        except LladaError as error:
            self._discard(order)
            self._failed(order.source, error)

    def _publish(self, order: _Order) -> Path:
        manifests.write_durably(order.partial / manifests.FILE_NAME, order.manifest)
        manifests.verify_sizes(order.partial, manifests.read(order.partial))
        manifests.sync_directory(order.partial)
        return self._retention.publish(order.partial, order.step)

    def _failed(self, checkpoint: Path, error: LladaError) -> None:
        place = self._retention.path
        self._say(f"WARNING: {checkpoint.name} could not be copied to {place}; training goes on: {error}")

    def _discard(self, order: _Order) -> None:
        if dist.get_rank() == 0:
            remove(order.partial)

    def _say(self, text: str) -> None:
        if dist.get_rank() == 0:
            self._report(text)


def _start_copier(order: dict[str, object]) -> subprocess.Popen[str] | None:
    """Start a process that copies this rank's share; None where it could not be started."""
    command = [sys.executable, "-P", "-m", "llada_megatron.parallel.checkpoint.copier"]
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        process.stdin.write(json.dumps(order))  # type: ignore[union-attr]
        process.stdin.close()  # type: ignore[union-attr]
    except OSError as error:
        print(f"no process for copying could be started ({explain(error)})", file=sys.stderr, flush=True)
        return None
    return process


def _outcome(copier: subprocess.Popen[str] | None) -> str | None:
    """Why this rank's share was not copied, or None if it was."""
    if copier is None:
        return f"rank {dist.get_rank()}: no process for copying could be started"
    fault = copier.stdout.read()  # type: ignore[union-attr]
    code = copier.wait()
    return None if code == 0 else f"rank {dist.get_rank()}: {fault or f'the copying process ended with code {code}'}"
