"""Where a conversion's output grows: a hidden directory beside the target, which becomes the target when it is whole.

    .NAME.converting/plan.json      what is converted, from which files, with which options
    .NAME.converting/journal/       a record of each finished task
    .NAME.converting/output/        what will be NAME

A conversion that was interrupted continues after its last finished task; one of something else is not continued.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from llada_megatron.llada_moe.errors import CheckpointError, ConfigError, ResourceError
from llada_megatron.parallel.checkpoint_manifest import sync_directory, write_durably

_PLAN = "plan.json"
_HEADROOM = 1.01  # headers and indices beside the tensors


class Workspace:
    """The output of one conversion while it is made. Use as a context manager: it holds a lock on the directory."""

    def __init__(self, target: Path, plan: dict[str, Any]) -> None:
        """Start, or continue what an interrupted conversion with the same plan left.

        Args:
            target: the directory to make; absent or empty.
            plan: JSON values that decide every byte of the output.

        Raises:
            ConfigError: the target is not empty or a mount point, or an unfinished conversion of something else is in
                the way.
            ResourceError: another process is converting to the same target.
        """
        self.target = Path(os.path.realpath(target))
        self.root = self.target.with_name(f".{self.target.name}.converting")
        self.output = self.root / "output"
        self._journal = self.root / "journal"
        if not self.root.exists():
            _require_empty(self.target)
        self._lock = _locked(self.root)
        try:
            self.complete = self._start(plan)
        except BaseException:
            self._lock.close()
            raise

    def _start(self, plan: dict[str, Any]) -> bool:
        """Whether everything was done but the last cleaning up."""
        text = json.dumps(plan, sort_keys=True, indent=1).encode()
        before = self.root / _PLAN
        known = before.read_bytes() if before.exists() else None
        if known == text and not self.output.exists() and self.target.exists():
            return True
        if known is not None and known != text:
            changed = ", ".join(_changes(json.loads(known), plan))
            raise ConfigError(
                f"{self.root} holds an unfinished conversion with another {changed}: repeat that command to finish it, "
                f"or remove that directory to start anew"
            )
        _require_empty(self.target)
        if not self.output.exists():  # its records speak of files that have been given away
            shutil.rmtree(self._journal, ignore_errors=True)
        self.output.mkdir(exist_ok=True)
        self._journal.mkdir(exist_ok=True)
        if known is None:
            write_durably(before.with_suffix(".new"), text)
            before.with_suffix(".new").rename(before)
            sync_directory(self.root)
        return False

    def finished(self) -> dict[int, Any]:
        """The records of the tasks that are done."""
        return {int(path.stem): json.loads(path.read_bytes()) for path in self._journal.glob("*.json")}

    def finish(self, task: int, record: Any) -> None:
        """Remember that a task is done; its files are on the storage already."""
        path = self._journal / f"{task}.new"
        write_durably(path, json.dumps(record).encode())
        path.rename(path.with_suffix(".json"))
        sync_directory(self._journal)

    def require_space(self, needed: int) -> None:
        """Raises: ResourceError: the disk has fewer than `needed` bytes free, before any is written."""
        free, needed = shutil.disk_usage(self.root).free, int(needed * _HEADROOM)
        if free < needed:
            raise ResourceError(
                f"{self.target} needs {needed / 1e9:.2f} GB more and the disk has {free / 1e9:.2f} GB free: "
                "make room and repeat the command (what is done is kept), or write elsewhere"
            )

    def publish(self) -> None:
        """Give the finished output its name, and remove the rest."""
        if not self.complete:
            for path in [*self.output.rglob("*"), self.output]:
                if path.is_dir():
                    sync_directory(path)
            if self.target.exists():
                self.target.rmdir()  # empty, or the rename would fail
            self.output.rename(self.target)
            sync_directory(self.target.parent)
        shutil.rmtree(self._journal, ignore_errors=True)  # before the plan: after a kill between, `_start` sees it done
        shutil.rmtree(self.root, ignore_errors=True)

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.close()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"no space left to write {self.target} ({error.strerror}): make room and repeat the command (what is "
                "done is kept), or write elsewhere"
            ) from error


def _require_empty(target: Path) -> None:
    if target.is_mount():
        raise ConfigError(f"{target} is a mount point, which cannot be replaced: name a new directory in it")
    if target.is_dir():
        inside = sorted(entry.name for entry in target.iterdir())
        if inside:
            raise ConfigError(f"{target} is not empty (it holds {inside[0]!r}): name a new directory, or empty it")
    elif target.exists():
        raise ConfigError(f"{target} is a file; name a new directory")


def _locked(root: Path) -> TextIO:
    """The workspace directory, made if need be, locked until the file is closed or the process ends."""
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{root} cannot be made ({error.strerror})") from error
    lock = (root / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ResourceError(f"another process is converting to the same place ({root}): wait for it") from None
    return lock


def _changes(known: dict[str, Any], plan: dict[str, Any]) -> list[str]:
    """The keys in which two plans differ."""
    return sorted(key for key in known.keys() | plan.keys() if known.get(key) != plan.get(key))
