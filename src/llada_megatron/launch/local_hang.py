"""Ending the ranks of this machine when they no longer get anywhere."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from llada_megatron.launch.hang import HangWatch, Stuck, suspects, write_stacks
from llada_megatron.parallel.coordinates import locate

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.schema import LayoutConfig, RecoveryConfig


class LocalHang:
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

    def _describe(self, stuck: list[Stuck], found: dict[int, str]) -> str:
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
