"""Scalars and texts of a run, written to metrics.jsonl and to TensorBoard."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from llada_megatron.parallel.training.metrics_file import FILE_NAME, parse_line

RETRY_S = 60.0
"""After a failure TensorBoard is left alone for so long."""


class TensorBoard:
    """TensorBoard's files in one directory.

    What cannot be written, on a full disk for instance, is left out, and training goes on: some time later there is a
    new file, since TensorBoard's writer does not survive a failure.
    """

    def __init__(self, directory: Path, from_step: int) -> None:
        """What was written of `from_step` and later no longer counts."""
        self._directory = directory
        self._purge_step: int | None = from_step
        self._writer: Any = None
        self._closed_until = 0.0
        self._write(lambda writer: None)

    def add(self, lines: list[Mapping[str, Any]]) -> None:
        """Add the scalars of lines with a `step`."""

        def add(writer: Any) -> None:
            for line in lines:
                for name, value in line.items():
                    if name not in ("schema", "step"):
                        writer.add_scalar(name, value, global_step=line["step"])

        self._write(add)

    def add_text(self, step: int, name: str, text: str) -> None:
        """Add a text."""
        self._write(lambda writer: writer.add_text(name, text, global_step=step))

    def close(self) -> None:
        """Write what is left."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()

    def _write(self, add: Callable[[Any], None]) -> None:
        if time.monotonic() < self._closed_until:
            return
        try:
            if self._writer is None:
                self._writer = _summary_writer(self._directory, self._purge_step)
                self._purge_step = None
            add(self._writer)
            self._writer.flush()
        except OSError as error:
            logging.getLogger(__name__).warning("TensorBoard misses what comes in %.0f s: %s", RETRY_S, error)
            self._closed_until = time.monotonic() + RETRY_S
            self.close()


def _summary_writer(directory: Path, purge_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # slow import, and optional per run

    return SummaryWriter(log_dir=str(directory), purge_step=purge_step)


SCHEMA = 1
"""Version of the lines in metrics.jsonl; raised when a key changes its meaning."""

Scalar = float | int | torch.Tensor


class MetricsWriter:
    """Writes one JSON object per reported step to RUN_DIR/metrics.jsonl, and the same scalars to TensorBoard.

    `from_step`: the first step that this process may report. A run that resumes takes over the lines before it and
    drops the others (and a last line cut short by a kill), so that no step appears twice. Only one process may write.
    Lines that cannot be written, on a full disk for instance, wait for the next `flush`.
    """

    def __init__(self, run_dir: Path | str, tensorboard: bool = True, from_step: int = 0) -> None:
        self._path = Path(run_dir) / FILE_NAME
        self._tensorboard = tensorboard
        self._pending: list[tuple[int, dict[str, Scalar]]] = []
        self._open(from_step)

    def _open(self, from_step: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _drop_lines_from(self._path, from_step)
        self._file = self._path.open("ab", buffering=0)  # so that it is known how much of a line is on a full disk
        self._unwritten, self._told = b"", False
        self._board = TensorBoard(self._path.parent / "tensorboard", from_step) if self._tensorboard else None

    @property
    def name(self) -> str:
        """The name of the metrics file."""
        return self._path.name

    def in_place(self) -> bool:
        """Whether the file that lines are written to still has its name; removing a folder does not close its files."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except FileNotFoundError:
            return False

    def go_back(self, from_step: int) -> None:
        """Drop what was written of `from_step` and later: these steps are run again, as after a resume."""
        self._pending.clear()
        self.close()
        self._open(from_step)

    def write_text(self, step: int, name: str, text: str) -> None:
        """A text for TensorBoard."""
        if self._board is not None:
            self._board.add_text(step, name, text)

    def write(self, step: int, values: Mapping[str, Scalar]) -> None:
        """Keeps the scalars of a step; tensors of one element stay on their device until `flush`.

        `values` must hold `consumed_sequences`, so that a line means the same under any batch size.
        """
        if "consumed_sequences" not in values:
            raise ValueError("values must hold 'consumed_sequences'")
        self._pending.append((step, {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in values.items()}))

    def flush(self) -> list[dict[str, Any]]:
        """Writes what is kept, and returns the lines. Waits for the device once. Call before a checkpoint counts."""
        lines = [{"schema": SCHEMA, "step": step, **values} for step, values in _to_numbers(self._pending)]
        self._pending.clear()
        for line in lines:
            finite = {k: v if math.isfinite(v) else None for k, v in line.items()}  # JSON has no NaN
            self._unwritten += json.dumps(finite, allow_nan=False).encode() + b"\n"
        self._write_file()
        if self._board is not None:
            self._board.add(lines)
        return lines

    def _write_file(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            if not self._told:
                logging.getLogger(__name__).warning("lines wait until %s can be written: %s", self._path, error)
            self._told = True
        else:
            self._told = False

    def close(self) -> None:
        """Writes what is left and closes the files."""
        self.flush()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _drop_lines_from(path: Path, from_step: int) -> None:
    """Cuts the file off after its last whole line of an earlier step, which a full disk does not hinder."""
    if not path.exists():
        return
    size = end = 0
    with path.open("rb") as file:
        for text in file:
            size += len(text)
            line = parse_line(text) if text.endswith(b"\n") else None
            if line is not None and line["step"] < from_step:
                end = size
    if end < size:
        os.truncate(path, end)


def _to_numbers(pending: list[tuple[int, dict[str, Scalar]]]) -> list[tuple[int, dict[str, float | int]]]:
    """All kept tensors as Python numbers through one copy per device."""
    tensors = [v for _, values in pending for v in values.values() if isinstance(v, torch.Tensor)]
    numbers: dict[int, float] = {}
    for device in {t.device for t in tensors}:
        here = [t for t in tensors if t.device == device]
        stacked = torch.stack([t.reshape(()).to(torch.float64) for t in here])
        numbers.update(zip(map(id, here), stacked.tolist(), strict=True))
    return [
        (step, {k: numbers[id(v)] if isinstance(v, torch.Tensor) else v for k, v in values.items()})
        for step, values in pending
    ]
