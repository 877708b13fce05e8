"""The output of a batch that may be interrupted: what it was asked for, the parts of its replicas, what is left."""

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
        """Go on with a file; a line that an interruption tore off is taken away.

        Raises:
            ResourceError: here and below, the file cannot be written (the disk is full).
        """
        self._path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("a+b", buffering=0)
            self._stream.truncate(_whole_length(self._stream))

    def append(self, result: Result) -> None:
        """One more; it is with the operating system when this returns."""
        line = memoryview((json.dumps(result.record(), ensure_ascii=False) + "\n").encode())
        with writing(self._path):
            while line:
                line = line[self._stream.write(line) :]

    def close(self) -> None:
        """Wait until the storage holds it."""
        with writing(self._path):
            os.fsync(self._stream.fileno())
            self._stream.close()


def part_path(base: Path, replica: int) -> Path:
    """Where a replica leaves its results."""
    return base.with_name(f"{base.name}.part-{replica}")


def part_paths(base: Path) -> list[Path]:
    """All parts that there are."""
    if not base.parent.is_dir():
        return []
    name = re.compile(re.escape(base.name) + r"\.part-\d+")  # a copy that someone made of a part is none
    return sorted(path for path in base.parent.iterdir() if name.fullmatch(path.name))


def records(path: Path, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
    """The whole lines of a file from an offset on, each with the offset behind it; what is torn is left out."""
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
    """Name the file where it cannot be written. Raises ResourceError."""
    try:
        yield
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror or error}") from error


def _whole_length(stream: Any) -> int:
    """Bytes up to the last line's end."""
    end = stream.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - (1 << 16))
        stream.seek(start)
        cut = stream.read(end - start).rfind(b"\n")
        if cut >= 0:
            return start + cut + 1
        end = start
    return 0


_FREE = ("layout", "batch_size")
"""Settings that may change between a run and its continuation: they do not change what is written."""


class BatchOutput:
    """Results in OUTPUT, while they come in OUTPUT.part-N, and what they are results of in OUTPUT.run.json."""

    def __init__(self, output: Path) -> None:
        """Raises ConfigError for a folder or a device."""
        if not output.name or (output.exists() and not output.is_file()):
            raise ConfigError(f"--output {output}: this is no file; results go to a file of their own")
        self.output = output
        self._request = output.with_name(output.name + ".run.json")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone with these files. Raises DataError where another process is, ResourceError where it cannot write."""
        path = self.output.with_name(self.output.name + ".lock")
        with writing(self.output):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            lock = path.open("w")
        with lock:
            if not _taken(lock, path):
                raise DataError(f"another process is writing {self.output}; wait for it, or choose another --output")
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def begin(self, request: Mapping[str, Any], prompts: Sequence[Prompt], overwrite: bool) -> set[int]:
        """Take up the batch where it stands; returns the numbers of the prompts that are finished.

        Raises:
            DataError: the files there are not results of this request, or of other prompts.
        """
        if overwrite:
            for path in (self.output, self._request, *part_paths(self.output)):
                path.unlink(missing_ok=True)
        digests = {str(prompt.number): prompt.digest for prompt in prompts}
        finished = {record["number"] for record in self._records()}
        before = self._read_request()
        if before is None:
            if self.output.exists() or part_paths(self.output):
                raise DataError(
                    f"{self.output} exists, and {self._request.name} beside it, which would tell what it holds, does "
                    "not; choose another --output, or give --overwrite"
                )
        else:
            self._require_same(before, request, digests, finished)
            digests = before["prompts"] | digests
        _replace(self._request, json.dumps({"request": request, "prompts": digests}, indent=1))
        return finished

    def merge(self) -> list[dict[str, Any]]:
        """Put all that is finished into the output, in the prompts' order; returns the records."""
        found = {record["number"]: record for record in self._records()}
        ordered = [found[number] for number in sorted(found)]
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in ordered)
        _replace(self.output, lines)
        for part in part_paths(self.output):
            part.unlink()
        return ordered

    def count(self) -> int:
        """Prompts that are finished."""
        return len({record["number"] for record in self._records()})

    def _records(self) -> Iterator[dict[str, Any]]:
        for path in (self.output, *part_paths(self.output)):
            if path.exists():
                for record, _ in records(path):
                    yield record

    def _read_request(self) -> dict[str, Any] | None:
        try:
            content = json.loads(self._request.read_text("utf-8"))
            return {"request": dict(content["request"]), "prompts": dict(content["prompts"])}
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{self._request} cannot be read ({error}); give --overwrite to begin anew") from error

    def _require_same(
        self, before: dict[str, Any], request: Mapping[str, Any], digests: Mapping[str, str], finished: set[int]
    ) -> None:
        if not finished:
            return
        then = before["request"]
        names = [name for name in {**then, **request} if name != "checkpoint" and then.get(name) != request.get(name)]
        shown = ["checkpoint" if name == "checkpoint_sha256" else name for name in names]
        differences = [f"{name} {then.get(name)!r} then, {request.get(name)!r} now" for name in shown]
        known = before["prompts"]
        changed = sorted(number for number in finished if digests.get(str(number)) != known.get(str(number)))
        if changed:
            numbers = ", ".join(map(str, changed[:5])) + (" …" if len(changed) > 5 else "")
            differences.append(f"prompt {numbers} is not the same")
        if differences:
            raise DataError(
                f"{self.output} holds {len(finished)} results of another request: {'; '.join(differences)}. "
                "Choose another --output, or give --overwrite"
            )


def request_of(settings: Settings, checkpoint: Path) -> dict[str, Any]:
    """What decides over the results, beside the prompts."""
    values = {name: value for name, value in settings.to_json().items() if name not in _FREE}
    manifest = checkpoint / "manifest.json"
    return values | {
        "checkpoint": str(checkpoint),
        "checkpoint_sha256": hashlib.sha256(manifest.read_bytes()).hexdigest(),
    }


def _taken(lock: TextIO, path: Path) -> bool:
    """Whether the lock of an open file is this process's now, and the file still the one at `path`."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return path.exists() and path.stat().st_ino == os.fstat(lock.fileno()).st_ino


def _replace(path: Path, text: str) -> None:
    """Write a file so that it is the old one or the new one at every moment. Raises ResourceError."""
    temporary = path.with_name(path.name + ".tmp")
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
