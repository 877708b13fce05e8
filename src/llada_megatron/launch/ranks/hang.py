"""Finding ranks that no longer get anywhere, from the heartbeats that they leave on their machine, and ending them."""

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

from llada_megatron.parallel.training.heartbeat import HeartbeatRecord, read_heartbeats

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.recovery import RecoveryConfig
from typing import TYPE_CHECKING

from llada_megatron.parallel.coordinates import locate

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.layout import LayoutConfig
    from llada_megatron.llada_moe.config.recovery import RecoveryConfig

_STEPS_FOR_A_MEDIAN = 3

_REMEMBERED = 128

_STACKS_S = 2.0
"""For the ranks to write their stacks."""

_SUSPENDED_S = 120.0
"""Between two looks: nothing else keeps the watcher that long (`scontrol suspend`, a virtual machine that is moved)."""


@dataclass(frozen=True)
class StuckRank:
    """Where a rank was when it last gave a sign of life."""

    rank: int
    step: int
    """Steps done."""
    phase: str
    seconds: float
    """Since the last sign of life."""

    def __str__(self) -> str:
        return f"{self.seconds:.0f} s without a sign of life ({self.phase}, {self.step} steps done)"


class HangWatch:
    """Watches the ranks of one start on one machine. Ask it often: it learns from what changes in between.

    The ranks wait for each other, so one that is stuck soon stops all of them: the newest sign of life counts.
    """

    def __init__(self, folder: Path, limits: RecoveryConfig, ranks: Sequence[int] = ()) -> None:
        self._folder, self._limits, self._ranks = folder, limits, ranks
        self._began = self._looked = self._resumed = time.monotonic()
        self._last: HeartbeatRecord | None = None
        self._first_step: int | None = None
        self._durations: deque[float] = deque(maxlen=_REMEMBERED)
        self.steps = 0
        """Steps done since the start, as far as they were seen."""

    def hung(self, now: float) -> list[StuckRank]:
        """All ranks when none has got anywhere for too long (`now`: seconds of the monotonic clock), else nothing."""
        heartbeats = read_heartbeats(self._folder)
        self._learn(heartbeats.values())
        if now - self._looked > _SUSPENDED_S:  # this program was suspended, and most likely the ranks as well
            self._resumed = now
        self._looked = now
        newest = max((heartbeat.at for heartbeat in heartbeats.values()), default=self._began)
        if now - max(newest, self._resumed) <= self._limit(heartbeats.values()):
            return []
        return self._standing(heartbeats, now)

    def standing(self, now: float) -> list[StuckRank]:
        """Where all ranks are, however long; for when another machine has found that they hang."""
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
            # A short first step may have gone by between two looks; what "start" said was still the step to begin at.
            self._first_step = last.step if last is not None and last.phase == "start" else foremost.step
        if self._first_step is not None:
            self.steps = max(0, foremost.step - self._first_step)
        if last is not None and foremost.step > last.step and last.phase == foremost.phase == "step":
            self._durations.append((foremost.at - last.at) / (foremost.step - last.step))

    def _limit(self, heartbeats: Iterable[HeartbeatRecord]) -> float:
        """Seconds without a sign of life that are too many now."""
        phases = {heartbeat.phase for heartbeat in heartbeats}
        if phases != {"step"} or self.steps < _STEPS_FOR_A_MEDIAN or not self._durations:
            return self._limits.hang_other_s
        return max(self._limits.hang_minimum_s, self._limits.hang_factor * statistics.median(self._durations))


def suspects(stuck: Sequence[StuckRank], states: Mapping[int, str]) -> list[StuckRank]:
    """Those that the others most likely wait for: stopped processes, else the ranks behind the others, else all."""
    stopped = [each for each in stuck if states.get(each.rank) == psutil.STATUS_STOPPED]
    fewest = min(each.step for each in stuck)
    return stopped or [each for each in stuck if each.step == fewest]


def write_stacks(processes: Mapping[int, int]) -> dict[int, str]:
    """Have each rank (rank to process id) write its stacks to its log; `states` of them meanwhile."""
    for pid in processes.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR2)
    time.sleep(_STACKS_S)
    return states(processes)


def states(processes: Mapping[int, int]) -> dict[int, str]:
    """What the system says that the process of each rank does (rank to process id): `sleeping`, `stopped`, …"""
    found = {}
    for rank, pid in processes.items():
        try:
            found[rank] = psutil.Process(pid).status()
        except psutil.Error:
            found[rank] = "gone"
    return found


class LocalHangWatch:
    """Watches the children of this process that are ranks."""

    def __init__(self, folder: Path, limits: RecoveryConfig, layout: LayoutConfig, log_dir: Path) -> None:
        self._watch = HangWatch(folder, limits, range(layout.world_size))
        self._layout, self._log_dir = layout, log_dir
        self.found: str | None = None
        """What is said of the ranks, once they hang."""

    def look(self) -> None:
        """End the ranks where they hang, once their stacks are in their logs."""
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
            f"the run hangs, so its ranks were ended. {which}. Stacks of all ranks: {self._log_dir}. Where it really "
            "takes so long, set larger limits: recovery.hang_other_s (the first 3 steps, and what is no step) or "
            "recovery.hang_minimum_s (later steps)"
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
