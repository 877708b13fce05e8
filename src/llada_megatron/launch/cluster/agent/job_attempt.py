"""One attempt of a job on one node: start the ranks, watch them, end them, and decide what follows."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from torch.distributed.elastic.rendezvous import RendezvousClosedError

from llada_megatron.launch.cluster.agent import decisions
from llada_megatron.launch.cluster.agent.node_ranks import NodeRanks
from llada_megatron.launch.cluster.agent.rank_watch import RankWatch, StartFolder, file_report, gather_reports
from llada_megatron.launch.cluster.fit import node_counts
from llada_megatron.launch.cluster.job import Verdict, VerdictStatus
from llada_megatron.launch.cluster.rendezvous import JobRendezvous
from llada_megatron.launch.ranks.local import python_program, threads_per_rank
from llada_megatron.launch.ranks.rank import PARENT_VARIABLE
from llada_megatron.launch.ranks.rank_reports import REPORTS_VARIABLE, read_result
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.parallel.checkpoint import manifest
from llada_megatron.parallel.training.heartbeat import FOLDER_VARIABLE

if TYPE_CHECKING:
    from torch.distributed import Store

    from llada_megatron.launch.cluster.agent.stop_signals import StopSignals
    from llada_megatron.launch.cluster.config import ClusterConfig
    from llada_megatron.launch.cluster.node import Node
    from llada_megatron.llada_moe.config.run import RunConfig

_POLL_S = 0.5

_GATHER_S = 60.0
"""How long the first node waits for the reports of the others; a node that is gone is noticed sooner."""

_GOODBYE_S = 15.0
"""How long the first node serves the store once it has closed the rendezvous."""

_GOODBYE_OF_THE_LOST_S = 3.0
"""The same for nodes that were lost: their agents may live, and only be late."""


class JobAttempt:
    """One node's part in an attempt of a job."""

    def __init__(self, node: Node, run: RunConfig, cluster: ClusterConfig, stop: StopSignals) -> None:
        self.node, self.run, self.cluster, self.stop = node, run, cluster, stop
        self.allowed_counts = node_counts(run, cluster.ranks_per_node, node.count)
        self.faults: list[decisions.RankFault] = []
        self.last_checkpoint = self._newest_checkpoint()  # the newest one when the last fault was counted
        self.stop_requested = False
        self.lost: set[str] = set()
        if not self.allowed_counts:
            raise ConfigError(
                f"no number of nodes up to {node.count} fits the run's layout with {cluster.ranks_per_node} ranks each"
            )

    def work(self, store: Store, scratch: Path) -> None:
        """Train until there is a verdict; the first node writes it.

        Args:
            store: the store of this attempt, which the first node serves.
            scratch: a folder on this node.
        """
        self.store, shrink = store, self.cluster.lost_node == "shrink"
        min_nodes = min(self.allowed_counts) if shrink else self.node.count
        late, limit = self.cluster.lost_node_wait_s, self.cluster.rendezvous_timeout_s
        self.rendezvous = JobRendezvous.of(self.node, store, min_nodes, late, limit)
        program = python_program("llada_megatron.launch.cluster.agent.job_rank", str(self.node.job.path))
        self.ranks = NodeRanks(self.rendezvous, self.cluster.ranks_per_node, program, str(scratch / "elastic"))
        try:
            verdict = self._wait_for_all_nodes()
            start = 0
            while verdict is None:
                verdict = self._run_once(scratch / f"start-{start}")
                start += 1
            self._end(verdict)
        except RendezvousClosedError:
            self.store.set(f"bye/{self.node.index}", "")
        finally:
            self.ranks.end()

    def _wait_for_all_nodes(self) -> Verdict | None:
        """Wait for the agents of all nodes before the first start; only after a fault may the run go on with fewer."""
        everyone = [f"here/{index}" for index in range(self.node.count)]
        self.store.set(everyone[self.node.index], self.node.name)
        deadline = time.monotonic() + self.cluster.rendezvous_timeout_s
        while not self.store.check(everyone):
            if self.node.first and self.stop.requested:
                return self._stop_verdict()
            if self.node.first and time.monotonic() > deadline:
                names = self.node.names()
                missing = ", ".join(names[i] for i, key in enumerate(everyone) if not self.store.check([key]))
                return Verdict("requeue", f"no agent on {missing} within {self.cluster.rendezvous_timeout_s} s")
            self.rendezvous.require_open()
            time.sleep(_POLL_S)
        return None

    def _run_once(self, folder: Path) -> Verdict | None:
        """Start the ranks on all nodes and wait for their end; None means that they are to be started again.

        Only the first node has a verdict; it tells the others by closing the rendezvous.
        """
        before = self.rendezvous.nodes
        self.ranks.wait_for_nodes()
        start, verdict = self._may_start(before)
        if not start:
            return verdict
        files = StartFolder(folder)
        with self.stop.held_back():
            self.ranks.start(self._environment(files))
        report = RankWatch(self.node, self.rendezvous, self.ranks, self.run, files, self.stop).wait()
        self._end_ranks(report)
        file_report(self.rendezvous, report)
        return self._decide(files) if self.node.first else None

    def _may_start(self, before: list[str]) -> tuple[bool, Verdict | None]:
        """Whether the nodes of this rendezvous start their ranks; the first node decides and says so in the store."""
        store = self.rendezvous.round_store
        if not self.node.first:
            return store.get("go") == b"yes", None
        gone = [name for name in before or self.node.names() if name not in self.rendezvous.nodes]
        verdict = self._obstacle(gone, not before)
        store.set("go", "no" if verdict else "yes")
        return verdict is None, verdict

    def _obstacle(self, gone: list[str], first: bool) -> Verdict | None:
        """On the first node: a verdict where the ranks must not be started; else announce the start and return None."""
        nodes, ranks = self.rendezvous.nodes, len(self.rendezvous.nodes) * self.cluster.ranks_per_node
        self.lost = set(self.node.names()) - set(nodes)
        if gone:
            self.node.event("lost", nodes=gone)
        if self.stop.requested:
            return self._stop_verdict()
        if len(nodes) not in self.allowed_counts:
            return Verdict("requeue", f"without {', '.join(gone)} the run does not fit the nodes that are left")
        checkpoint = self._newest_checkpoint()
        without_progress = decisions.attempts_without_progress(self.node.job.events(), self.node.attempt, checkpoint)
        if first and without_progress >= max(
            1, self.cluster.max_restarts
        ):  # those attempts were killed before they said so
            return Verdict(
                "failed", f"{without_progress} attempts in a row ended without a newer checkpoint; see their faults"
            )
        newest = "no checkpoint yet" if checkpoint is None else f"newest checkpoint: step {checkpoint}"
        without = f", without {', '.join(gone)}" if gone else ""
        self.node.say(f"{ranks} {'rank' if ranks == 1 else 'ranks'} on {', '.join(nodes)} start{without}; {newest}")
        self.node.event("start", checkpoint=checkpoint, nodes=nodes, ranks=ranks)
        return None

    def _environment(self, files: StartFolder) -> dict[str, str]:
        cores = threads_per_rank(self.cluster.ranks_per_node)
        return {
            REPORTS_VARIABLE: str(files.reports),
            FOLDER_VARIABLE: str(files.heartbeats),
            PARENT_VARIABLE: str(os.getpid()),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores)),
        }

    def _end_ranks(self, report: decisions.RankReport) -> None:
        if report.faults:
            more = len(report.faults) - 1
            self.node.say(f"{decisions.cause(report.faults)}{f'; {more} more' if more else ''}")
        for fault in report.faults:
            self.node.event("fault", kind=fault.kind, on=fault.node, rank=fault.rank, what=fault.what)
        left = self.ranks.end()
        if left:
            self.node.say(f"ranks {left} do not end even when they are killed: their processes hang in a driver")
            self.node.event("fault", kind="error", on=self.node.name, rank=left[0], what="does not end when killed")

    def _decide(self, files: StartFolder) -> Verdict | None:
        """On the first node: the verdict that follows from all nodes' reports; None means to start the ranks again."""
        reports, lost = gather_reports(self.rendezvous, _GATHER_S)
        self.lost |= set(lost)
        self.stop_requested = (
            self.stop_requested or self.stop.requested or any(report.stop_requested for report in reports)
        )
        if all(report.finished for report in reports) and not lost:
            steps = int(read_result(files.reports).get("steps", 0))
            return decisions.after_end(steps, self.run.training.steps, self.node.job.stop.exists())
        found = [fault for report in reports for fault in report.faults]
        found += [decisions.RankFault("lost", name, None, "no longer answers", time.time()) for name in lost]
        newest = self._newest_checkpoint()
        if newest is not None and (self.last_checkpoint is None or newest > self.last_checkpoint):
            self.faults = []
        self.last_checkpoint = newest
        self.faults.append(decisions.cause(found or [_unexplained_fault(self.node)]))
        verdict = decisions.after_faults(self.faults, self._restart_context(newest, lost))
        if verdict is None:
            self._announce_restart(newest)
        return verdict

    def _restart_context(self, newest: int | None, lost: list[str]) -> decisions.RestartContext:
        left = len(self.rendezvous.nodes) - len(lost)
        return decisions.RestartContext(
            max_restarts=self.cluster.max_restarts,
            nodes=self.node.count,
            fits=not lost or (self.cluster.lost_node == "shrink" and left in self.allowed_counts),
            attempts_without_progress=decisions.attempts_without_progress(
                self.node.job.events(), self.node.attempt, newest
            ),
            stop_requested=self.stop_requested,
            stop_file=self.node.job.stop.exists(),
        )

    def _announce_restart(self, newest: int | None) -> None:
        fault, count = self.faults[-1], len(self.faults)
        self.node.say(f"restart {count} of {self.cluster.max_restarts} without a newer checkpoint, because {fault}")
        self.node.event("restart", reason=str(fault), rank=fault.rank, on=fault.node, checkpoint=newest)

    def _end(self, verdict: Verdict) -> None:
        """On the first node: write the verdict, then serve the store until the other nodes that are there have left."""
        asked = self.stop_requested or self.stop.requested
        self.node.job.write_verdict(self.node.attempt, verdict)
        self.node.event("end", word=verdict.status, reason=verdict.reason, asked=asked)
        self.node.say(f"{verdict.status}: {verdict.reason}")
        self.rendezvous.set_closed()
        began = time.monotonic()
        while self._awaits_goodbye(time.monotonic() - began):
            time.sleep(_POLL_S)

    def _awaits_goodbye(self, waited_s: float) -> bool:
        """Whether a node whose agent has come has not left yet, and may still be about to."""
        return any(
            waited_s < (_GOODBYE_OF_THE_LOST_S if name in self.lost else _GOODBYE_S)
            and self.store.check([f"here/{index}"])
            and not self.store.check([f"bye/{index}"])
            for index, name in enumerate(self.node.names())
            if index
        )

    def _stop_verdict(self) -> Verdict:
        status: VerdictStatus = "stopped" if self.node.job.stop.exists() else "requeue"
        return Verdict(status, "asked to stop before the ranks had started")

    def _newest_checkpoint(self) -> int | None:
        """Step of the newest checkpoint, also of a damaged one; None where there is none."""
        found = manifest.steps(Path(self.run.output_dir) / "checkpoints")
        return found[0][0] if found else None


def _unexplained_fault(node: Node) -> decisions.RankFault:
    return decisions.RankFault("error", node.name, None, "ended, but no node reported a fault", time.time())
