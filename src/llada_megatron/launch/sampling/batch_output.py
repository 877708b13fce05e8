"""The files of a batch that can be interrupted: a part for each replica, a description of the run, and the output."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from llada_megatron.llada_moe.errors import ConfigError, DataError, ResourceError
from llada_megatron.parallel.sampling.prompts import Prompt
from llada_megatron.parallel.sampling.results import Result
from llada_megatron.parallel.sampling.settings import Settings


class PartFile:
    """Results of one replica, each appended as soon as it is finished."""

    def __init__(self, path: Path) -> None:
        """Open a part file to append to it. An incomplete last line, left by an interruption, is removed.

        Raises:
            ResourceError: here and in the methods, the file cannot be written, for example because the disk is full.
        """
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("a+b", buffering=0)
            self._stream.truncate(_whole_length(self._stream))

    def append(self, result: Result) -> None:
        """Append a result; the operating system has it when this returns."""
        line = memoryview((json.dumps(result.record(), ensure_ascii=False) + "\n").encode())
        with writing(self._path):
            while line:
                line = line[self._stream.write(line) :]

    def close(self) -> None:
        """Wait until the storage device holds the results, and close the file."""
        with writing(self._path):
            os.fsync(self._stream.fileno())
            self._stream.close()


def part_path(base: Path, replica: int) -> Path:
    """The part file of a replica."""
    return base.with_name(f"{base.name}.part-{replica}")


def part_paths(base: Path) -> list[Path]:
    """All part files that exist."""
    if not base.parent.is_dir():
        return []
    name = re.compile(re.escape(base.name) + r"\.part-\d+")  # copies of parts that a user made do not match
    return sorted(path for path in base.parent.iterdir() if name.fullmatch(path.name))


def records(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The results in a file from an offset on, each with the offset of its end in bytes. Broken lines are skipped."""
    with path.open("rb") as stream:
        stream.seek(offset)
        for line in stream:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("number"), int):
                yield record, offset


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the `with` block into a ResourceError that names the file."""
    try:
        yield
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror or error}") from error


def _whole_length(stream: Any) -> int:
    """Bytes of a file up to the end of its last complete line."""
    end = stream.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - (1 << 16))
        stream.seek(start)
        cut = stream.read(end - start).rfind(b"\n")
        if cut >= 0:
            return start + cut + 1
        end = start
    return 0


_FREE = ("layout", "batch_size", "cuda_graphs")
"""Settings that may change between a run and its continuation, because they do not change the results."""


class BatchOutput:
    """The files of a batch: OUTPUT, OUTPUT.part-N until the batch is complete, and OUTPUT.run.json.

    OUTPUT.run.json describes what the results depend on, so that a batch is only continued with the same settings.
    """

    def __init__(self, path: Path) -> None:
        """`path`: OUTPUT. Raises ConfigError for a folder or a device."""
        if not path.name or (path.exists() and not path.is_file()):
            raise ConfigError(f"--output {path}: this is no file; results go to a file of their own")
        self.path = path
        self._run_file = path.with_name(path.name + ".run.json")
        self._lock_file = path.with_name(path.name + ".lock")

    @property
    def files(self) -> list[Path]:
        """Every file that a batch writes or removes, as far as they can be known before it."""
        written = [self.path, self._run_file]
        return [*written, self._lock_file, *map(_temporary, written), part_path(self.path, 0), *part_paths(self.path)]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes away from these files.

        Raises:
            DataError: another process holds the lock.
            ResourceError: the lock file cannot be written.
        """
        lock_path = self._lock_file
        with writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = lock_path.open("w")
        with lock:
            if not _acquire(lock, lock_path):
                raise DataError(f"another process is writing {self.path}; wait for it, or choose another --output")
            try:
                yield
            finally:
                lock_path.unlink(missing_ok=True)

    def begin(self, description: Mapping[str, Any], prompts: Sequence[Prompt], overwrite: bool) -> set[int]:
        """Begin or continue a batch; returns the numbers of the prompts that are finished.

        Args:
            description: what the results depend on besides the prompts; see `run_description`.
            prompts: all prompts of the batch.
            overwrite: delete earlier results first.

        Raises:
            DataError: there are results of another description or of other prompts.
        """
        if overwrite:
            for path in (self.path, self._run_file, *part_paths(self.path)):
                path.unlink(missing_ok=True)
        digests = {str(prompt.number): prompt.digest for prompt in prompts}
        finished = {record["number"] for record in self._records()}
        before = self._read_description()
        if before is None:
            if self.path.exists() or part_paths(self.path):
                raise DataError(
                    f"{self.path} exists, but {self._run_file.name} beside it, which says what it holds, does not; "
                    "choose another --output, or give --overwrite"
                )
        else:
            self._require_same(before, description, digests, finished)
            digests = before["prompts"] | digests
        _replace(self._run_file, json.dumps({"request": description, "prompts": digests}, indent=1))
        return finished

    def merge(self) -> list[dict[str, Any]]:
        """Merge all finished results into the output, in the order of the prompts; returns the records."""
        found = {record["number"]: record for record in self._records()}
        ordered = [found[number] for number in sorted(found)]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in ordered)
        _replace(self.path, lines)
        for part in part_paths(self.path):
            part.unlink()
        return ordered

    def count(self) -> int:
        """How many prompts are finished."""
        return len({record["number"] for record in self._records()})

    def _records(self) -> Iterator[dict[str, Any]]:
        for path in (self.path, *part_paths(self.path)):
            if path.exists():
                for record, _ in records(path):
                    yield record

    def _read_description(self) -> dict[str, Any] | None:
        try:
            content = json.loads(self._run_file.read_text("utf-8"))
            return {"request": dict(content["request"]), "prompts": dict(content["prompts"])}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self._run_file} cannot be read ({error}); give --overwrite to begin anew") from error

    def _require_same(
        self, before: dict[str, Any], now: Mapping[str, Any], digests: Mapping[str, str], finished: set[int]
    ) -> None:
        """Raises DataError where finished results are of another description, or of prompts that have changed."""
        if not finished:
            return
        then = before["request"]
        names = [name for name in {**then, **now} if name != "checkpoint" and then.get(name) != now.get(name)]
        shown = ["checkpoint" if name == "checkpoint_sha256" else name for name in names]
        differences = [f"{name} {then.get(name)!r} then, {now.get(name)!r} now" for name in shown]
        known = before["prompts"]
        changed = sorted(number for number in finished if digests.get(str(number)) != known.get(str(number)))
        if changed:
            numbers = ", ".join(map(str, changed[:5])) + (" …" if len(changed) > 5 else "")
            differences.append(f"prompt {numbers} is not the same")
        if differences:
            raise DataError(
                f"{self.path} holds {len(finished)} results of another request: {'; '.join(differences)}. "
                "Choose another --output, or give --overwrite"
            )


def run_description(settings: Settings, checkpoint: Path) -> dict[str, Any]:
    """Everything that the results depend on, besides the prompts."""
    values = {name: value for name, value in settings.to_json().items() if name not in _FREE}
    manifest = checkpoint / "manifest.json"
    return values | {
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest(),
    }


def _acquire(lock: TextIO, path: Path) -> bool:
    """Lock an open file, if it is still the file at `path` and no other process holds its lock; returns whether."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino


def _temporary(path: Path) -> Path:
    """The name under which a file is written before it takes its own."""
    return path.with_name(path.name + ".tmp")


def _replace(path: Path, text: str) -> None:
    """Replace a file atomically. Raises ResourceError."""
    temporary = _temporary(path)
    try:
        with writing(path), temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        descriptor = os.open(path.parent, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
