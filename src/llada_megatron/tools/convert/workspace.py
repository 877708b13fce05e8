"""The directory in which a conversion's output grows, so that it can be interrupted, continued and published whole."""

from __future__ import annotations

import datetime
import errno
import json
import os
import shutil
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from llada_megatron.console import message
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError, ResourceError
from llada_megatron.parallel.checkpoint.manifest import sync_directory, write_durably
from llada_megatron.tools.convert.target import Lock, require_empty, resolve, work_directory

FILES = "source's files"
"""The key in a plan under which the states of the source's files stand."""

_MOST_CHANGES = 6

_MOST_CHARACTERS = 100


def read_json(path: Path) -> Any:
    """The content of a JSON file of a workspace, or None if there is none. Raises CheckpointError: it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}): remove {path.parent} to convert anew") from None


def file_states(paths: Iterable[Path], whole_paths: bool = False) -> dict[str, str]:
    """The size and the time of the last change (UTC) of each file, which show that a file was changed.

    They are by name, or by whole path where several directories are read.
    """
    states = {}
    for path in paths:
        found = path.stat()
        seconds, rest = divmod(found.st_mtime_ns, 10**9)
        date = datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
        states[str(path) if whole_paths else path.name] = f"{found.st_size:,} bytes of {date}.{rest:09}"
    return states


def changes(known: dict[str, Any], plan: dict[str, Any]) -> str:
    """The keys in which two plans differ, each with its value in `known` and in `plan`, as text."""
    before, after = dict(_leaves(known)), dict(_leaves(plan))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    found = [f"{key}: {_text(before.get(key))} -> {_text(after.get(key))}" for key in keys[:_MOST_CHANGES]]
    more = f" (and {len(keys) - _MOST_CHANGES} more)" if len(keys) > _MOST_CHANGES else ""
    return "; ".join(found) + more


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}, {key}" if prefix else key
        if isinstance(value, dict):
            yield from _leaves(value, name)
        else:
            yield name, value


def _text(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"


_PLAN, _PUBLISHED = "plan.json", "published.json"

_HEADROOM = 1.01  # headers and indices beside the tensors


def unfinished_plan(target: Path) -> dict[str, Any]:
    """The plan of an unfinished conversion to `target`; empty if there is none."""
    root = work_directory(resolve(target))
    if not os.path.isdir(root):
        return {}
    published = read_json(root / _PUBLISHED) or {}
    return read_json(root / _PLAN) or published.get("plan") or {}


class Workspace:
    """The output of one conversion while it is made; a context manager that holds a lock on the directory."""

    def __init__(self, target: Path, plan: dict[str, Any]) -> None:
        """Start, or continue what an interrupted conversion with the same plan left.

        Args:
            target: the directory to make, which is absent or empty.
            plan: JSON values that decide every byte of the output.

        Raises:
            ConfigError: the target is not empty or a mount point, or there is an unfinished conversion with another
                plan.
            CheckpointError: no directory can be made beside the target.
            ResourceError: another process is converting to the same target.
        """
        self.target = resolve(target)
        self.root = work_directory(self.target)
        self.output = self.root / "output"
        self._journal = self.root / "journal"
        self.plan: dict[str, Any] = json.loads(json.dumps(plan))
        self._lock = Lock(self.root)
        try:
            self.complete = self._start()
        except BaseException:
            self._lock.release()
            raise

    def _start(self) -> bool:
        """Prepare the directory; returns whether all was done already except for the last cleaning up."""
        published = self._published()
        if published == self.plan:
            return True
        if not self.output.exists():  # it was published, or no conversion was begun
            self._clean()
        known = read_json(self.root / _PLAN)
        if known not in (None, self.plan):
            raise ConfigError(
                f"{self.root} holds an unfinished conversion that differs in {changes(known, self.plan)}. Repeat that "
                "command to finish it, or remove that directory to start anew"
            )
        require_empty(self.target)
        self.output.mkdir(exist_ok=True)
        self._journal.mkdir(exist_ok=True)
        if known is None:
            self._write(self.root / _PLAN, self.plan)
        return False

    def _published(self) -> dict[str, Any] | None:
        """The plan of the conversion that published the target, if all files of that are there, else None."""
        published = read_json(self.root / _PUBLISHED)
        if published is None or self.output.exists() or published["files"] != _sizes(self.target):
            return None
        plan: dict[str, Any] = published["plan"]
        return plan

    def resume(self) -> dict[int, Any]:
        """The records of the tasks that are done and whose files are there, by number of the task.

        Everything else in the output is removed: its space may be needed, and nothing stale may be published.
        """
        found, records, kept = _sizes(self.output), {}, set()
        journal = list(self._journal.glob("*.json"))
        for path in journal:
            done = read_json(path)
            if done["files"].items() <= found.items():
                records[int(path.stem)] = done["record"]
                kept |= done["files"].keys()
            else:
                path.unlink()
        if len(records) < len(journal):
            message(f"files of {len(journal) - len(records)} finished parts are gone or cut: these are done again")
        for name in found.keys() - kept:
            (self.output / name).unlink()
        return records

    def finish(self, task: int, record: Any, files: Collection[Path]) -> None:
        """Note in the journal that a task is done, once the storage has the names of its files; it has the contents."""
        sizes = {str(path.relative_to(self.output)): path.stat().st_size for path in files}
        for folder in {folder for path in files for folder in path.parents if folder.is_relative_to(self.root)}:
            sync_directory(folder)
        self._write(self._journal / f"{task}.json", {"files": sizes, "record": record})

    def require_space(self, needed: int) -> None:
        """Raises: ResourceError: the disk has fewer than `needed` bytes free, before any is written."""
        free, needed = shutil.disk_usage(self.root).free, int(needed * _HEADROOM)
        if free < needed:
            raise ResourceError(
                f"{self.target} needs {needed / 1e9:.2f} GB more and the disk has {free / 1e9:.2f} GB free: "
                "make room and repeat the command (what is done is kept), or write elsewhere"
            )

    def require_unchanged(self, paths: Iterable[Path], whole_paths: bool = False) -> None:
        """Raises CheckpointError: one of the source's files `paths` was written since the conversion began.

        `whole_paths`: as the plan has their states.
        """
        try:
            now = file_states(paths, whole_paths)
        except OSError as error:
            raise CheckpointError(f"{error.filename} went away while it was converted ({error.strerror})") from error
        before = self.plan[FILES]
        if before != now:
            raise CheckpointError(
                f"the source changed while it was converted ({changes(before, now)}), and the output may be of either: "
                f"wait until nothing writes there, remove {self.root}, and repeat the command"
            )

    def publish(self) -> None:
        """Give the finished output the name of the target, and remove everything else."""
        if not self.complete:
            for path in [*self.output.rglob("*"), self.output]:
                if path.is_dir():
                    sync_directory(path)
            self._write(self.root / _PUBLISHED, {"plan": self.plan, "files": _sizes(self.output)})
            require_empty(self.target)
            if self.target.exists():
                self.target.rmdir()  # empty, or the rename would fail
            self.output.rename(self.target)
            sync_directory(self.target.parent)
            sync_directory(self.root)
        self._clean()

    def _clean(self) -> None:
        """Remove what is in the directory; the file that says that the target is finished goes last."""
        shutil.rmtree(self._journal, ignore_errors=True)
        for name in (_PLAN, _PUBLISHED):
            (self.root / name).with_suffix(".new").unlink(missing_ok=True)
            (self.root / name).unlink(missing_ok=True)

    def _write(self, path: Path, content: Any) -> None:
        """Write a JSON file so that it is there as a whole or not at all, and wait until the storage holds it."""
        new = path.with_suffix(".new")
        write_durably(new, json.dumps(content, indent=1).encode())
        new.rename(path)
        sync_directory(path.parent)

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"no space left to write {self.target} ({error.strerror}): make room and repeat the command (what is "
                "done is kept), or write elsewhere"
            ) from error


def _sizes(directory: Path) -> dict[str, int]:
    """Size of every file under a directory, by its path in there."""
    return {
        str(path.relative_to(directory)): path.lstat().st_size for path in directory.rglob("*") if not path.is_dir()
    }
