"""Memory of a program and all its processes, watched while it runs."""

from __future__ import annotations

import contextlib
import threading
from types import TracebackType

import psutil


class PeakMemory:
    """Largest resident size of every process of this program during a `with` block.

    Short peaks between two looks are missed; memory that processes share is counted in each.
    """

    def __init__(self, seconds_between_looks: float = 0.5) -> None:
        self._pause = seconds_between_looks
        self._peaks: dict[tuple[int, float], int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    @property
    def gigabytes(self) -> float:
        """Sum over all processes seen of each one's peak, in GB (10^9 bytes)."""
        return sum(self._peaks.values()) / 1e9

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        here = psutil.Process()
        while True:
            for process in [here, *here.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    name = process.pid, process.create_time()
                    self._peaks[name] = max(self._peaks.get(name, 0), process.memory_info().rss)
            if self._done.wait(self._pause):
                return
