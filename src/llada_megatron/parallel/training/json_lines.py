"""A file of JSON lines, one a step, that a run appends to and can take back."""

from __future__ import annotations

import json
import logging
import mmap
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llada_megatron.parallel.training.metrics_file import parse_line

_STEP = re.compile(rb'\{\s*(?:"schema":\s*\d+,\s*)?"step":\s*(\d+)[,}]')
"""The beginning of a line, which may go on for megabytes."""
_BEGINNING = 256


class JsonLines:
    """Appends lines with a `step`. Those that cannot be written, on a full disk for instance, wait for the next time.

    A run that resumes takes over the lines before its first step and drops the others (and a last line cut short by a
    kill), so that no step appears twice. Only one process may write.
    """

    def __init__(self, path: Path, from_step: int) -> None:
        """`from_step`: the first step that this process may report."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_lines_from(path, from_step)
        self._file = path.open("ab", buffering=0)  # so that it is known how much of a line is on a full disk
        self._unwritten, self._told = b"", False

    def append(self, line: Mapping[str, Any]) -> None:
        """Keep a line for `write`."""
        self._unwritten += json.dumps(line, allow_nan=False, separators=(",", ":")).encode() + b"\n"

    def in_place(self) -> bool:
        """Whether the file that lines are written to still has its name; removing a folder does not close its files."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def write(self) -> None:
        """Write what is kept."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._told:
                logging.getLogger(__name__).warning("lines wait until %s can be written: %s", self.path, error)
            self._told = True
        else:
            self._told = False

    def close(self) -> None:
        """Close the file; call `write` before."""
        self._file.close()


def _drop_lines_from(path: Path, from_step: int) -> None:
    """Cuts the file off after its last whole line of an earlier step, which a full disk does not hinder."""
    size = path.stat().st_size if path.exists() else 0
    if not size:  # which cannot be mapped
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        end = text.rfind(b"\n") + 1
        while end:
            start = text.rfind(b"\n", 0, end - 1) + 1
            if _is_before(text, start, end, from_step):
                break
            end = start
    if end < size:
        os.truncate(path, end)


def _is_before(text: mmap.mmap, start: int, end: int, from_step: int) -> bool:
    """Whether a whole line at bytes [start, end) is of an earlier step; it is read whole only where it may be."""
    found = _STEP.match(text[start : min(end, start + _BEGINNING)])
    if found is not None and int(found[1]) >= from_step:
        return False
    line = parse_line(text[start:end])
    return line is not None and line["step"] < from_step
