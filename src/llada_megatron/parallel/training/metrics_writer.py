"""Scalars and texts of a run, written to metrics.jsonl and to TensorBoard."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from llada_megatron.parallel.training.json_lines import JsonLines
from llada_megatron.parallel.training.metrics_file import EXPERTS_FILE_NAME, FILE_NAME

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
        self._draws = True
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

    def add_image(self, step: int, name: str, image: NDArray[np.uint8]) -> None:
        """Add an image `[height, width, 3]`. Where Pillow is missing there are no images, and one warning."""
        if not self._draws:
            return
        try:
            self._write(lambda writer: writer.add_image(name, image, global_step=step, dataformats="HWC"))
        except ImportError as error:  # releases of TensorBoard differ in whether they bring it
            self._draws = False
            logging.getLogger(__name__).warning("TensorBoard gets no images (pip install pillow): %s", error)

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

EXPERTS_SCHEMA = 1
"""The same of experts.jsonl."""

Scalar = float | int | torch.Tensor


class MetricsWriter:
    """Writes one JSON object per reported step to RUN_DIR/metrics.jsonl, and the same scalars to TensorBoard.

    `from_step`: the first step that this process may report. A run that resumes takes over the lines before it and
    drops the others (and a last line cut short by a kill), so that no step appears twice. Only one process may write.
    Lines that cannot be written, on a full disk for instance, wait for the next `flush`.
    """

    def __init__(
        self, run_dir: Path | str, tensorboard: bool = True, from_step: int = 0, experts: bool = False
    ) -> None:
        """`experts`: the model has some, and `write_experts` will be called."""
        self._path = Path(run_dir) / FILE_NAME
        self._of_experts = experts
        self._tensorboard = tensorboard
        self._pending: list[tuple[int, dict[str, Scalar]]] = []
        self._open(from_step)

    def _open(self, from_step: int) -> None:
        self._lines = JsonLines(self._path, from_step)
        experts = self._path.with_name(EXPERTS_FILE_NAME)
        self._experts = JsonLines(experts, from_step) if self._of_experts or experts.exists() else None
        self._board = TensorBoard(self._path.parent / "tensorboard", from_step) if self._tensorboard else None

    @property
    def name(self) -> str:
        """The name of the metrics file."""
        return self._path.name

    def in_place(self) -> bool:
        """Whether the file that lines are written to still has its name."""
        return self._lines.in_place()

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
            self._lines.append(finite)
        self._lines.write()
        if self._board is not None:
            self._board.add(lines)
        return lines

    def write_experts(self, step: int, line: Mapping[str, Any], image: NDArray[np.uint8]) -> None:
        """The counts of an interval that ends with `step`, and their image `[height, width, 3]` for TensorBoard."""
        if self._experts is not None:
            self._experts.append({"schema": EXPERTS_SCHEMA, "step": step, **line})
            self._experts.write()
        if self._board is not None:
            self._board.add_image(step, "experts", image)

    def close(self) -> None:
        """Writes what is left and closes the files."""
        self.flush()
        self._lines.close()
        if self._experts is not None:
            self._experts.write()
            self._experts.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


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
