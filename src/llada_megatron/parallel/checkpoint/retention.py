"""Which checkpoints of a run are kept: new ones get their name, old ones are removed, `latest` names the newest.

Nothing here is collective; rank 0 alone calls it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.parallel.checkpoint import manifest as manifests

LATEST = "latest"

_PARTIAL = ".partial-"

_REPLACED = ".replaced-"


@dataclass
class Retention:
    """The checkpoints of one run in the directory `path`; at most one process may write to it."""

    path: Path
    keep_last: int = 3
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are never removed; 0 = there are none such."""
    _swept: bool = field(default=False, repr=False)

    def make_partial(self, step: int) -> Path:
        """A new directory to write the checkpoint of `step` into; it does not count as one."""
        if not self._swept:
            self._sweep()
            self._swept = True
        # a name of its own, so that a writer left by a killed run can never write into this save
        directory = self.path / f".{manifests.step_name(step)}{_PARTIAL}{os.getpid():x}-{time.time_ns():x}"
        directory.mkdir(parents=True)
        return directory

    def publish(self, partial: Path, step: int, protected: Collection[str] = ()) -> Path:
        """Give a complete directory its name, name it in `latest`, and remove the checkpoints that need not be kept.

        Args:
            protected: names of directories that are being read, and are not removed.
        """
        target = self.path / manifests.step_name(step)
        _give_name(partial, target)
        self._point_latest(target)
        self._prune(step, protected)
        return target

    def _point_latest(self, target: Path) -> None:
        new = self.path / f".{LATEST}{_PARTIAL}{os.getpid():x}"
        manifests.write_durably(new, f"{target.name}\n".encode())
        new.replace(self.path / LATEST)
        manifests.sync_directory(self.path)

    def _prune(self, newest: int, protected: Collection[str]) -> None:
        """Of the checkpoints up to step `newest`, keep the last `keep_last` whole ones and the one that `latest` names.

        Later ones are neither counted nor removed: the run fell back from them because they were damaged.
        """
        found = [(step, path) for step, path in manifests.steps(self.path) if step <= newest]
        kept = [step for step, path in found if fault(path) is None][: self.keep_last]
        for step, path in found:
            permanent = step > 0 and self.keep_every > 0 and step % self.keep_every == 0
            if kept and step < kept[-1] and not permanent and path.name not in (self._latest_name(), *protected):
                remove(path)

    def _latest_name(self) -> str | None:
        with contextlib.suppress(OSError):
            return (self.path / LATEST).read_text().strip()
        return None

    def _sweep(self) -> None:
        """Remove what a killed run left, but put back a checkpoint whose replacement was never completed."""
        for path in self.path.glob(f".*{_REPLACED}*"):
            target = self.path / path.name[1:].split(_REPLACED)[0]
            if target.exists():
                remove(path)
            else:
                path.rename(target)
        for path in self.path.glob(f".*{_PARTIAL}*"):
            remove(path)


def fault(path: Path) -> str | None:
    """What the names and sizes of its files show to be wrong with a step directory, or None."""
    try:
        manifests.verify_sizes(path, manifests.read(path))
    except CheckpointError as error:
        return str(error)
    return None


def remove(path: Path) -> None:
    """Remove a directory or file. The manifest goes first, so that a half-removed directory is no checkpoint."""
    with contextlib.suppress(OSError):
        (path / manifests.FILE_NAME).unlink()
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _give_name(directory: Path, target: Path) -> None:
    """Rename `directory` to `target`; a damaged checkpoint of that name is moved aside first, and then removed."""
    aside = target.with_name(f".{target.name}{_REPLACED}{time.time_ns():x}")
    if target.exists():
        target.rename(aside)
    directory.rename(target)
    manifests.sync_directory(target.parent)
    remove(aside)
