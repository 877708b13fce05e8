"""The scalars and texts of a run for TensorBoard."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

RETRY_S = 60.0
"""After a failure TensorBoard is left alone for so long."""


class Board:
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
