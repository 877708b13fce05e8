"""Watching the ranks on one node, from their start until they are to end on all nodes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from llada_megatron.launch.cluster.agent.decisions import RankFault, RankReport, faults_of_exits
from llada_megatron.launch.ranks.hang import HangWatch, StuckRank, suspects, write_stacks
from llada_megatron.launch.ranks.rank import log_path
from llada_megatron.launch.ranks.rank_reports import read_failures

if TYPE_CHECKING:
    from llada_megatron.launch.cluster.agent.node_ranks import NodeRanks
    from llada_megatron.launch.cluster.agent.stop_signals import StopSignals
    from llada_megatron.launch.cluster.node import Node
    from llada_megatron.launch.cluster.rendezvous import JobRendezvous
    from llada_megatron.llada_moe.config.run import RunConfig

_POLL_S, _LOOK_S = 0.2, 1.0
"""Seconds between two looks at the processes of this node, and between two looks at the store."""

_SETTLE_S = 0.5
"""Seconds for the other ranks on this node to fail as well, so that the one that failed first is known."""

_OVER = "over"
"""Key of the store; once it is set, the ranks are to end on all nodes. Its value says why: end, fault, hang or lost."""


class StartFolder:
    """Folders for the reports and heartbeats of the ranks. They are on this node: a file server may be slow."""

    def __init__(self, path: Path) -> None:
        self.reports, self.heartbeats = path / "reports", path / "heartbeats"
        for folder in (self.reports, self.heartbeats):
            folder.mkdir(parents=True)


class RankWatch:
    """Waits until the ranks on all nodes have ended or are to end; a node with a fault tells the others so."""

    def __init__(
        self,
        node: Node,
        rendezvous: JobRendezvous,
        ranks: NodeRanks,
        run: RunConfig,
        folder: StartFolder,
        stop: StopSignals,
    ) -> None:
        self._node, self._rendezvous, self._store, self._ranks = node, rendezvous, rendezvous.round_store, ranks
        self._folder, self._stop = folder, stop
        self._logs = Path(run.output_dir) / "logs"
        self._hang = HangWatch(folder.heartbeats, run.recovery, ranks.ranks)
        self._stop_requested = self._trained = False

    def wait(self) -> RankReport:
        """Wait until the ranks have ended without a fault on all nodes, or there is a fault on one of them.

        Raises:
            DistError, RendezvousError: the first node no longer answers.
        """
        look = 0.0
        while True:
            time.sleep(_POLL_S)
            exits, now = self._ranks.exits(), time.monotonic()
            stuck = self._hang.hung(now)
            self._note_training()  # before looking for exits: training is noted even where it ends within this interval
            if any(exits.values()):
                return self._failed()
            if len(exits) < len(self._ranks.ranks) and stuck:
                return self._hung(stuck)
            if now >= look:
                look = now + _LOOK_S
                if (report := self._look(len(exits) == len(self._ranks.ranks))) is not None:
                    return report

    def _look(self, finished: bool) -> RankReport | None:
        """Pass a request to stop on to the ranks, and look at the state of the other nodes."""
        if self._stop.requested:
            if self._node.first and not self._stop_requested:
                self._node.event("asked")  # at once: a preemption may leave no time to note it later
            self._stop_requested = True
            self._ranks.ask_to_stop()
        if finished:
            self._store.set(f"finished/{self._node.name}", "yes")
        absent = self._rendezvous.absent()
        if self._store.check([_OVER]):  # read after `absent`: a node that leaves has set this key before
            return self._over_elsewhere(finished)
        if absent:
            self._store.set(_OVER, "lost")
            now = time.time()
            return self._report(False, [RankFault("lost", name, None, "no longer answers", now) for name in absent])
        if self._node.first and finished and self._store.check([f"finished/{name}" for name in self._rendezvous.nodes]):
            self._store.set(_OVER, "end")
            return self._report(True)
        return None

    def _note_training(self) -> None:
        if self._node.first and not self._trained and self._hang.steps > 0:
            self._trained = True
            self._node.event("training")

    def _failed(self) -> RankReport:
        time.sleep(_SETTLE_S)
        self._store.set(_OVER, "fault")
        return self._report(False, self._faults())

    def _hung(self, stuck: Sequence[StuckRank]) -> RankReport:
        self._store.set(_OVER, "hang")
        return self._report(False, self._hang_faults(stuck))

    def _over_elsewhere(self, finished: bool) -> RankReport:
        how = self._store.get(_OVER).decode()
        faults = self._faults()
        if how == "hang" and not finished:
            faults += self._hang_faults(self._hang.standing(time.monotonic()))
        return self._report(finished and how == "end", faults)

    def _hang_faults(self, stuck: Sequence[StuckRank]) -> list[RankFault]:
        """Have the ranks on this node write their stacks; the faults of those that the others most likely wait for."""
        seen = self._stacks()
        self._node.event("hang", ranks=[each.rank for each in stuck])
        return [self._hang_fault(each, seen.get(each.rank, "gone")) for each in suspects(stuck, seen)]

    def _hang_fault(self, stuck: StuckRank, state: str) -> RankFault:
        silent_since = time.time() - stuck.seconds  # so that the rank with the oldest heartbeat counts as the cause
        what = f"hangs: {stuck}, its process is {state}"
        if state == psutil.STATUS_STOPPED:
            return RankFault("stopped", self._node.name, stuck.rank, what, silent_since)
        what += f"; its stacks: {log_path(self._logs, stuck.rank)}"
        return RankFault("hang", self._node.name, stuck.rank, what, silent_since)

    def _stacks(self) -> dict[int, str]:
        """Have the ranks on this node write their stacks; returns the state of their processes meanwhile."""
        exits = self._ranks.exits()
        return write_stacks({r: each.pid for r, each in self._ranks.processes().items() if r not in exits})

    def _faults(self) -> list[RankFault]:
        reported = read_failures(self._folder.reports)
        return faults_of_exits(self._node.name, self._ranks.exits(), reported, self._logs, time.time())

    def _report(self, finished: bool, faults: Sequence[RankFault] = ()) -> RankReport:
        return RankReport(self._node.name, finished, self._stop_requested, tuple(faults))


def file_report(rendezvous: JobRendezvous, report: RankReport) -> None:
    """Send the first node how the ranks on this node ended, before this node leaves the rendezvous."""
    rendezvous.round_store.set(f"report/{report.node}", json.dumps(report.to_dict()))


def gather_reports(rendezvous: JobRendezvous, patience_s: float) -> tuple[list[RankReport], list[str]]:
    """On the first node: the reports of all nodes, and the names of those that have sent none within `patience_s`."""
    deadline, reports = time.monotonic() + patience_s, []
    waiting = list(rendezvous.nodes)
    while waiting:
        absent = rendezvous.absent()
        for name in list(waiting):
            if rendezvous.round_store.check([f"report/{name}"]):
                reports.append(RankReport.from_dict(json.loads(rendezvous.round_store.get(f"report/{name}"))))
                waiting.remove(name)
        if set(waiting) <= set(absent) or time.monotonic() > deadline:
            break
        time.sleep(_POLL_S)
    return reports, waiting
