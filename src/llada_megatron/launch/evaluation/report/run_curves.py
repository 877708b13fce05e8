"""What the metrics file of a run says, in bounded memory however long the run was."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llada_megatron.pages.charts import Mark
from llada_megatron.parallel.training.metrics_file import EXPERTS_FILE_NAME, FILE_NAME, parse_line

MOST_POINTS = 400
"""Points of a curve; where a run wrote down more values, each point stands for several."""
CURVES = (
    "loss",
    "learning_rate",
    "grad_norm",
    "bits_per_byte",
    "validation/bits_per_byte",
    "validation/loss",
    "expert_load/max_over_mean",
    "expert_load/dead",
)
"""The figures that are followed over the steps."""
BY_MASK_RATIO = "loss_by_mask_ratio/"


@dataclass
class _Bucket:
    """Consecutive values of a curve."""

    steps: int
    """Sum of their steps."""
    total: float
    least: float
    most: float
    count: int = 1

    def take(self, other: _Bucket) -> None:
        """Add later values."""
        self.total, self.count = self.total + other.total, self.count + other.count
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        self.steps += other.steps


class Curve:
    """The values of a figure over the steps: the mean, least and greatest of at most `MOST_POINTS` groups."""

    def __init__(self) -> None:
        self.values = 0
        self.missing: list[int] = []
        """Steps whose value is not a number; the first `MOST_POINTS` of them."""
        self.missing_count = 0
        self.first: tuple[int, float] | None = None
        self.least: tuple[int, float] | None = None
        self.last: tuple[int, float] | None = None
        self.group = 1
        """Values that a point stands for."""
        self._buckets: list[_Bucket] = []

    def add(self, step: int, value: float | None) -> None:
        """The value of a later step; None, which stands for what is not a number, is counted as missing."""
        if value is None:
            self.missing_count += 1
            if len(self.missing) < MOST_POINTS:
                self.missing.append(step)
            return
        self.values += 1
        self.first = self.first or (step, value)
        self.last = step, value
        if self.least is None or value < self.least[1]:
            self.least = step, value
        if self._buckets and self._buckets[-1].count < self.group:
            self._buckets[-1].take(_Bucket(step, value, value, value))
            return
        if len(self._buckets) == MOST_POINTS:
            for one, other in zip(self._buckets[::2], self._buckets[1::2], strict=True):
                one.take(other)
            self._buckets, self.group = self._buckets[::2], 2 * self.group
        self._buckets.append(_Bucket(step, value, value, value))

    @property
    def marks(self) -> list[Mark]:
        """The points, from left to right, each at the mean of the steps that it stands for."""
        return [
            Mark(b.steps / b.count, b.total / b.count, *((b.least, b.most) if self.group > 1 else ()))
            for b in self._buckets
        ]


@dataclass
class RunCurves:
    """What `metrics.jsonl` and `experts.jsonl` of a run hold."""

    curves: dict[str, Curve] = field(default_factory=lambda: {name: Curve() for name in CURVES})
    by_mask_ratio: dict[str, float | None] = field(default_factory=dict)
    """Loss of the last interval that was reported, by the bin's name such as `0.1-0.2`."""
    by_mask_ratio_step: int | None = None
    last: dict[str, Any] = field(default_factory=dict)
    """The last value of each figure that is a number."""
    lines: int = 0
    skipped: int = 0
    """Steps that the recovery policy left out."""
    broken: int = 0
    """Lines that are no metrics."""
    experts: dict[str, Any] | None = None
    """The last line of `experts.jsonl`."""

    def add(self, line: dict[str, Any]) -> None:
        """Take a line of `metrics.jsonl` in."""
        self.lines += 1
        self.skipped += line.get("skipped") == 1
        step = line["step"]
        for name, value in line.items():
            number = value if isinstance(value, int | float) and math.isfinite(value) else None
            if name in self.curves:
                self.curves[name].add(step, number)
            elif name.startswith(BY_MASK_RATIO):
                if self.by_mask_ratio_step != step:
                    self.by_mask_ratio, self.by_mask_ratio_step = {}, step
                self.by_mask_ratio[name.removeprefix(BY_MASK_RATIO)] = number
            if number is not None:
                self.last[name] = number


def read_curves(folder: Path) -> RunCurves:
    """Read the files of a run's folder; a line that is being written, or cut short, counts as broken.

    Raises:
        OSError: one of them cannot be read.
    """
    found = RunCurves()
    for line in _lines(folder / FILE_NAME):
        if line is None:
            found.broken += 1
        else:
            found.add(line)
    for line in _lines(folder / EXPERTS_FILE_NAME):
        found.experts = line or found.experts
    return found


def _lines(path: Path) -> Iterator[dict[str, Any] | None]:
    if not path.exists():
        return
    with path.open("rb") as stream:
        yield from map(parse_line, _whole(stream))


def _whole(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Without empty lines, and without a last line that the run is writing."""
    return (line for line in lines if line.endswith(b"\n") and line.strip())
