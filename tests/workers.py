"""How the suite is spread over the processes of pytest-xdist: whole files, and some tests alone on the machine.

Under `-n 3 --dist loadgroup` each group of tests runs in one process, in its order. A file is a group, so that the
fixtures of a module are built once; so is a folder whose tests share something larger. Tests that are marked `alone`
bound a time that a busy neighbour could exceed: they come last, and run while no other process runs a test.

Three processes for two cores, because much of the time is waiting, most of it for a real SLURM.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = ("tests/slurm", "tests/launch/sampling")
"""Folders whose tests share a fixture of the session: a real SLURM with jobs, a set of checkpoints."""

FIRST = ("tests/slurm", "tests/launch/cluster")
"""What waits more than it computes goes first, so that the others compute meanwhile and none ends late."""

ALONE = "alone"


def group_of(item: pytest.Item) -> str:
    """The tests that run in the same process as this one."""
    if item.get_closest_marker(ALONE):
        return ALONE
    path = item.path.relative_to(ROOT).as_posix()
    return next((folder for folder in SHARED if path.startswith(f"{folder}/")), path)


def rank_of(item: pytest.Item) -> int:
    """Tests of a lower rank start earlier."""
    if item.get_closest_marker(ALONE):
        return len(FIRST) + 1
    path = item.path.relative_to(ROOT).as_posix()
    return next((number for number, folder in enumerate(FIRST) if path.startswith(f"{folder}/")), len(FIRST))


@contextlib.contextmanager
def machine(alone: bool, folder: Path = ROOT / "tests") -> Iterator[None]:
    """Hold the machine: together with other tests, or alone.

    The locks are on two files in `folder`, and end with the process that holds them. Everybody passes the first lock,
    so that whoever waits to be alone is not overtaken again and again.
    """
    with (folder / "conftest.py").open("r+") as turn, (folder / "workers.py").open("r+") as room:
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # not by closing: a process that the test forked may still have the file
