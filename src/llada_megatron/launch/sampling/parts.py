"""Results on disk while a batch is written: lines of JSON that are whole or not there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llada_megatron.launch.sampling.results import Result
from llada_megatron.llada_moe.errors import ResourceError


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
