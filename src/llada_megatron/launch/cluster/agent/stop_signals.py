"""Requests to stop that reach an agent: signals from SLURM, and the file that `llada stop` makes."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

NUMBERS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Remembers whether the job was asked to stop; more requests change nothing. Call `listen` before anything slow."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._signalled = False

    def listen(self) -> StopSignals:
        """Handle the signals from now on (main thread only)."""
        for number in NUMBERS:
            signal.signal(number, self._handle)
        return self

    @property
    def requested(self) -> bool:
        """Whether the job was asked to save and end."""
        return self._signalled or self._file.exists()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Block these signals, and SIGUSR2 (which asks for stacks), in processes that are started while this is open.

        Each of them unblocks the signals once it handles them.
        """
        blocked = (*NUMBERS, signal.SIGUSR2)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
        try:
            yield
        finally:
            self.listen()  # torch elastic sets handlers of its own whenever it starts processes
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
