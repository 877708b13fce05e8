"""Results on disk while a batch is written: lines of JSON that are whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llada_megatron.launch.sampling.results import Result


class PartFile:
    """Results of one replica, each appended as soon as it is finished."""

    def __init__(self, path: Path) -> None:
        """Go on with a file; a line that an interruption tore off is taken away."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = path.open("a+b")
        self._stream.truncate(_whole_length(self._stream))

    def append(self, result: Result) -> None:
        """One more; it is with the operating system when this returns."""
        line = json.dumps(result.record(), ensure_ascii=False) + "\n"
        self._stream.write(line.encode("utf-8", "surrogatepass"))
        self._stream.flush()

    def close(self) -> None:
        """Wait until the storage holds it."""
        os.fsync(self._stream.fileno())
        self._stream.close()


def part_path(base: Path, replica: int) -> Path:
    """Where a replica leaves its results."""
    return base.with_name(f"{base.name}.part-{replica}")


def part_paths(base: Path) -> list[Path]:
    """All parts that there are."""
    prefix = base.name + ".part-"
    if not base.parent.is_dir():
        return []
    return sorted(path for path in base.parent.iterdir() if path.name.startswith(prefix))


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
