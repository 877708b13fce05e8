"""The results of `llada bench gpu` on disk: a JSON object a line, each written the moment it is known.

A process that is killed while it writes leaves at most half a line at the end, which is passed over.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llada_megatron.console import message
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.tools.bench.gpu.measured_machine import Machine

DONE = "done"


@dataclass(frozen=True)
class Measurement:
    """One measurement of a part: its figures, or why there are none."""

    part: str
    name: str
    figures: dict[str, Any]
    """Numbers by name, and now and then a text or a list of numbers; JSON values all."""
    seconds: float
    error: str | None = None


@dataclass
class Known:
    """What a file holds."""

    machine: Machine | None = None
    measurements: dict[tuple[str, str], Measurement] = field(default_factory=dict)
    """By part and name; of several the last."""
    begun: dict[str, float] = field(default_factory=dict)
    """Parts that began and have not ended, and when, of time.time()."""
    expected: dict[str, list[str]] = field(default_factory=dict)
    """Names of the measurements that make a part whole, where it has said so."""
    ends: dict[str, tuple[str, str]] = field(default_factory=dict)
    """How each part ended last: "done", or another word; and the details."""

    def figure(self, part: str, name: str, figure: str) -> Any:
        """A figure; None where it was not measured."""
        found = self.measurements.get((part, name))
        return None if found is None else found.figures.get(figure)

    def of(self, part: str) -> list[Measurement]:
        """The measurements of a part, in the order in which they came first."""
        return [found for (owner, _), found in self.measurements.items() if owner == part]


class ResultsFile:
    """A file of results; several processes may append to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def beside(self, ending: str) -> Path:
        """A file next to it, such as `bench-gpu.kernels.txt`."""
        return self.path.with_name(f"{self.path.stem}.{ending}")

    def open_for(self, machine: Machine) -> None:
        """Go on with the file, or begin one, for the figures of `machine`.

        Raises:
            ConfigError: it holds those of another machine.
            OSError: it cannot be written to.
        """
        found = self.read().machine
        if found is not None and found != machine:
            raise ConfigError(
                f"{self.path} holds figures of {found.describe()}, and this is {machine.describe()}; "
                "give another file with --output"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if found is not None and found.code != machine.code:
            message(
                f"{self.path} holds figures of the code {found.code}, which stay, and this is {machine.code}: "
                "for figures of one code give another file with --output"
            )
        if found is None or found.code != machine.code:
            self._append({"kind": "machine", **asdict(machine)})

    def read(self) -> Known:
        """All that is in the file; nothing where there is none.

        Raises:
            ConfigError: it is another kind of file.
        """
        known = Known()
        if not self.path.exists():
            return known
        lines = self.path.read_text("utf-8", errors="replace").split("\n")
        for line in filter(str.strip, lines):
            try:
                _take(known, json.loads(line))
            except (ValueError, TypeError, KeyError):
                continue  # half a line of a process that was killed
        if known.machine is None and any(lines):
            raise ConfigError(f"{self.path} holds no results of `llada bench gpu`; give another file with --output")
        return known

    def plan(self, part: str) -> None:
        """A part is to run, whatever became of it in an earlier start; its measurements stay."""
        self._append({"kind": "planned", "part": part})

    def begin(self, part: str) -> None:
        """A part begins."""
        self._append({"kind": "begin", "part": part, "time": time.time()})

    def expect(self, part: str, names: Sequence[str]) -> None:
        """What a part is going to measure: without one of these it is not whole."""
        self._append({"kind": "expected", "part": part, "names": list(names)})

    def add(self, measurement: Measurement) -> None:
        """A measurement was made."""
        self._append({"kind": "measurement", **asdict(measurement)})

    def end(self, part: str, status: str, detail: str = "") -> None:
        """A part ended; `status` is "done" where nothing of it is left to do."""
        self._append({"kind": "end", "part": part, "status": status, "detail": detail})

    def _append(self, line: dict[str, Any]) -> None:
        """On the disk before it returns. It begins a line of its own, whatever a killed process left before it."""
        content = b"\n" + json.dumps(line).encode() + b"\n"
        number = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            os.write(number, content)
            os.fsync(number)
        finally:
            os.close(number)


def _take(known: Known, line: dict[str, Any]) -> None:
    kind = line.pop("kind")
    if kind == "machine":
        known.machine = Machine(**line)
    elif kind == "planned":
        known.begun.pop(line["part"], None)
        known.ends.pop(line["part"], None)
    elif kind == "begin":
        known.begun[line["part"]] = line["time"]
    elif kind == "expected":
        known.expected[line["part"]] = line["names"]
    elif kind == "measurement":
        found = Measurement(**line)
        known.measurements[found.part, found.name] = found
    elif kind == "end":
        known.begun.pop(line["part"], None)
        known.ends[line["part"]] = (line["status"], line["detail"])
