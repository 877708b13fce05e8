"""Finding ranks that hang, from the heartbeats that they write on their machine, and ending them."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from llada_megatron.parallel.coordinates import locate
from llada_megatron.parallel.training.heartbeat import HeartbeatRecord, read_heartbeats

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.layout import LayoutConfig
    from llada_megatron.llada_moe.config.recovery import RecoveryConfig

_STEPS_FOR_A_MEDIAN = 3

_REMEMBERED = 128

_STACKS_S = 2.0
"""Seconds for the ranks to write their stacks."""

_SUSPENDED_S = 120.0
"""After so many seconds between two looks the watcher itself must have been suspended (`scontrol suspend`, a virtual
machine that is moved): nothing else keeps it that long."""


@dataclass(frozen=True)
class StuckRank:
    """The last heartbeat of a rank that hangs."""

    rank: int
    step: int
    """Number of steps done."""
    phase: str
    seconds: float
    """Seconds since the heartbeat."""

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s without a heartbeat ({self.phase}, {self.step} steps done)"


class HangWatch:
    """Watches the heartbeats of the ranks on one machine, from one start of them on.

    Call `hung` often: it learns the duration of a step from what has changed between two calls. The ranks wait for each
    other, so one that is stuck soon stops all of them; hence the newest heartbeat of all counts.
    """

    def __init__(self, folder: Path, limits: RecoveryConfig, ranks: Sequence[int] = ()) -> None:
        self._folder, self._limits, self._ranks = folder, limits, ranks
        self._began = self._looked = self._resumed = time.monotonic()
        self._last: HeartbeatRecord | None = None
        self._first_step: int | None = None
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self.steps = 0
        """Number of steps done since the start, as far as they were seen."""

    def hung(self, now: float) -> list[StuckRank]:
        """All ranks where none has made progress for too long, else none (`now`: seconds of the monotonic clock)."""
        heartbeats = read_heartbeats(self._folder)
        self._learn(heartbeats.values())
        if now - self._looked > _SUSPENDED_S:  # this process was suspended, and most likely the ranks as well
            self._resumed = now
        self._looked = now
        newest = max((heartbeat.at for heartbeat in heartbeats.values()), default=self._began)
        if now - max(newest, self._resumed) <= self._limit(heartbeats.values()):
            return []
        return self._standing(heartbeats, now)

    def standing(self, now: float) -> list[StuckRank]:
        """All ranks with their last heartbeats; for when another machine has found that the ranks hang."""
        return self._standing(read_heartbeats(self._folder), now)

    def _standing(self, heartbeats: Mapping[int, HeartbeatRecord], now: float) -> list[StuckRank]:
        nothing = HeartbeatRecord(0, "start", self._began)
        found = {rank: heartbeats.get(rank, nothing) for rank in sorted({*self._ranks, *heartbeats})}
        return [
            StuckRank(rank, heartbeat.step, heartbeat.phase, now - heartbeat.at) for rank, heartbeat in found.items()
        ]

    def _learn(self, heartbeats: Iterable[HeartbeatRecord]) -> None:
        foremost = max(heartbeats, key=lambda heartbeat: (heartbeat.step, heartbeat.at), default=None)
        if foremost is None or foremost == self._last:
            return
        last, self._last = self._last, foremost
        if self._first_step is None and foremost.phase not in ("start", "load"):
            # A short first step may have passed between two looks; the heartbeat of "start" has the step to begin at.
            self._first_step = last.step if last is not None and last.phase == "start" else foremost.step
        if self._first_step is not None:
            self.steps = max(0, foremost.step - self._first_step)
        if last is not None and foremost.step > last.step and last.phase == foremost.phase == "step":
            self._durations.append((foremost.at - last.at) / (foremost.step - last.step))

    def _limit(self, heartbeats: Iterable[HeartbeatRecord]) -> float:
        """Seconds without a heartbeat after which the ranks count as hung, in their current phase."""
        phases = {heartbeat.phase for heartbeat in heartbeats}
        if phases != {"step"} or self.steps < _STEPS_FOR_A_MEDIAN or not self._durations:
            return self._limits.hang_other_s
        return max(self._limits.hang_minimum_s, self._limits.hang_factor * statistics.median(self._durations))


def suspects(stuck: Sequence[StuckRank], states: Mapping[int, str]) -> list[StuckRank]:
    """The ranks that the others most likely wait for: stopped processes, else those with the fewest steps."""
    stopped = [each for each in stuck if states.get(each.rank) == psutil.STATUS_STOPPED]
    fewest = min(each.step for each in stuck)
    return stopped or [each for each in stuck if each.step == fewest]


def write_stacks(processes: Mapping[int, int]) -> dict[int, str]:
    """Have each rank (rank to process id) write its stacks to its log; returns their `states` meanwhile."""
    for pid in processes.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR2)
    time.sleep(_STACKS_S)
    return states(processes)


def states(processes: Mapping[int, int]) -> dict[int, str]:
    """The state of each rank's process (rank to process id) as psutil names it: `sleeping`, `stopped`, …; or `gone`."""
    found = {}
    for rank, pid in processes.items():
        try:
            found[rank] = psutil.Process(pid).status()
        except psutil.Error:
            found[rank] = "gone"
    return found


class LocalHangWatch:
    """Watches the ranks that are children of this process, and ends them when they hang."""

    def __init__(self, folder: Path, limits: RecoveryConfig, layout: LayoutConfig, log_dir: Path) -> None:
        self._watch = HangWatch(folder, limits, range(layout.world_size))
        self._layout, self._log_dir = layout, log_dir
        self.found: str | None = None
        """The message for the user, once the ranks have hung."""

    def look(self) -> None:
        """Look once: ranks that hang write their stacks to their logs and are ended."""
        stuck = [] if self.found else self._watch.hung(time.monotonic())
        if not stuck:
            return
        ranks = _ranks()
        self.found = self._describe(stuck, write_stacks(ranks))
        for pid in ranks.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # every rank leads a process group of its own

    def _describe(self, stuck: list[StuckRank], found: dict[int, str]) -> str:
        which = "; ".join(
            f"{locate(each.rank, self._layout)}: {each}, its process is {found.get(each.rank, 'gone')}"
            for each in suspects(stuck, found)
        )
        return (
            f"the run hangs, so its ranks were ended. {which}. Stacks of all ranks: {self._log_dir}. If the run really "
            "takes so long, set larger limits: recovery.hang_other_s (for the first 3 steps, and for all that is not "
            "a step) or recovery.hang_minimum_s (for later steps)"
        )


def _ranks() -> dict[int, int]:
    """Process ids of the children of this process that are ranks, by rank."""
    found = {}
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            rank = child.environ().get("RANK")
            if rank is not None:
                found[int(rank)] = child.pid
    return found
