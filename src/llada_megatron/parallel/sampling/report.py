"""What writing took on one rank."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from llada_megatron.parallel import device


@dataclass
class Report:
    """Counts of this rank's replica, and times of this rank; they add up over all that a writer writes."""

    passes: int = 0
    """Forward passes, over all groups."""
    idle_passes: int = 0
    """Those that ran only because replicas which share experts with this one had work."""
    positions_run: int = 0
    """Positions that passed through the layers, with blank twins and shadows."""
    rows_read: int = 0
    """Rows that met the output layer."""
    bytes_per_row: int = 0
    """The most that left this rank for one such row: its packet to the other vocabulary shards (counted where there is
    one shard too), and the row's statistics to the next pipeline stage."""
    seconds: float = 0.0
    """Of wall time, while there was something to write."""
    busy_seconds: float = 0.0
    """Of them, those in which this rank ran layers or read rows; what experts and tensor ranks wait for counts too."""

    @property
    def busy_share(self) -> float:
        """Share of the time in which this rank's stage was computing."""
        return self.busy_seconds / self.seconds if self.seconds else 0.0


class Stopwatch:
    """Adds up the time of pieces of work; on a GPU the time that they take there, without waiting for them."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside."""
        if device.cuda_available():
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            yield
            ended.record()
            self._events.append((began, ended))
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def take(self) -> float:
        """Seconds of the work that is over since the last call; work on a GPU may count in a later call."""
        seconds, self._seconds = self._seconds, 0.0
        while self._events and self._events[0][1].query():
            began, ended = self._events.pop(0)
            seconds += began.elapsed_time(ended) / 1000.0
        return seconds
