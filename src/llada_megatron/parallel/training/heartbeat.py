"""Signs of life of the ranks on one machine: what each is doing and since when, in small files that a watcher reads.

Writing one costs a system call on a node-local file and never waits for other ranks, so that a rank that is stuck in a
collective still shows where it got to.
"""

from __future__ import annotations

import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

FOLDER_VARIABLE = "LLADA_HEARTBEATS"
"""Environment variable with the folder of these files; unset = nobody watches, and nothing is written."""

Phase = Literal["start", "step", "validation", "save", "load", "done"]

PHASES: tuple[Phase, ...] = get_args(Phase)

_RECORD = struct.Struct("<qqq")  # step, phase, nanoseconds: smaller than a page, so a reader never sees half of one


@dataclass(frozen=True)
class HeartbeatRecord:
    """The last sign of life of a rank."""

    step: int
    """Steps done when it was given."""
    phase: Phase
    at: float
    """Seconds of CLOCK_MONOTONIC, which all processes of a machine share."""


class Heartbeat:
    """The writer of one rank's file; `path` None does nothing."""

    def __init__(self, path: Path | None) -> None:
        self._file: int | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)

    @classmethod
    def of_rank(cls, rank: int) -> Heartbeat:
        """The file of `rank` in the folder that the environment names."""
        folder = os.environ.get(FOLDER_VARIABLE)
        return cls(heartbeat_path(Path(folder), rank) if folder else None)

    def beat(self, step: int, phase: Phase) -> None:
        """Say that `phase` begins, or goes on, after `step` steps."""
        if self._file is not None:
            os.pwrite(self._file, _RECORD.pack(step, PHASES.index(phase), time.monotonic_ns()), 0)


def heartbeat_path(folder: Path, rank: int) -> Path:
    """File of a rank."""
    return folder / f"rank-{rank}"


def read_heartbeats(folder: Path) -> dict[int, HeartbeatRecord]:
    """The last beat of every rank that gave one."""
    beats = {}
    for path in folder.glob("rank-*"):
        record = path.read_bytes()
        if len(record) == _RECORD.size:
            step, phase, at = _RECORD.unpack(record)
            beats[int(path.name.removeprefix("rank-"))] = HeartbeatRecord(step, PHASES[phase], at / 1e9)
    return beats
