"""What every process of a job owes the others: it stops when it is asked to."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from types import FrameType

PARENT_VARIABLE = "LLADA_PARENT"
"""Environment variable with the process id of the local launcher."""


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class StopRequest:
    """Whether this process was asked to stop. Call it: False until the first SIGINT or SIGTERM, then True.

    A second signal ends the process at once, unless it is `patient`: SLURM asks more than once.
    """

    def __init__(self, patient: bool = False) -> None:
        self._asked = False
        self._patient = patient
        self._numbers: tuple[signal.Signals, ...] = ()

    def listen(self, signals: Iterable[signal.Signals] = (signal.SIGINT, signal.SIGTERM)) -> StopRequest:
        """Handle `signals` from now on (main thread only); one that came during the start counts as well."""
        self._numbers = tuple(signals)
        for number in self._numbers:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)
        return self

    def ignore(self) -> None:
        """The work is done: signals no longer matter. Else they would kill a Python that is shutting down."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    def __call__(self) -> bool:
        return self._asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked and not self._patient:
            os._exit(128 + number)
        self._asked = True
