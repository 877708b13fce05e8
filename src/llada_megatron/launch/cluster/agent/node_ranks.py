"""The ranks of one node, started and ended together by torch elastic's agent; `JobAttempt` decides when."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs

if TYPE_CHECKING:
    from llada_megatron.launch.cluster.rendezvous import JobRendezvous

_END_S = 20.0
"""How long to wait for a killed process: one that is blocked in a driver ends only when the driver returns."""


class NodeRanks(LocalElasticAgent):
    """The ranks on this node.

    Torch's own loop is not used: it ends ranks with SIGTERM, which asks ours to save; it restarts them without asking
    what went wrong; and it does not notice that a node is gone.
    """

    def __init__(self, rendezvous: JobRendezvous, ranks: int, program: Sequence[str], scratch: str) -> None:
        spec = WorkerSpec(
            role="rank",
            local_world_size=ranks,
            entrypoint=program[0],
            args=tuple(program[1:]),
            rdzv_handler=rendezvous,
            max_restarts=0,
        )
        super().__init__(spec, DefaultLogsSpecs(log_dir=scratch))
        self._stop_requested: set[int] = set()

    def wait_for_nodes(self) -> None:
        """Wait for the other nodes. Which ranks run on this node follows from which nodes are there.

        Raises:
            RendezvousError, DistError: torch's own errors, when the nodes do not find each other.
        """
        self._rendezvous(self._worker_group)

    @property
    def ranks(self) -> list[int]:
        """The ranks on this node, as of the last rendezvous."""
        return [worker.global_rank for worker in self._worker_group.workers]

    def start(self, environment: Mapping[str, str]) -> None:
        """Start the ranks, with `environment` laid over this process's own."""
        os.environ.update(environment)
        self._stop_requested.clear()
        self._start_workers(self._worker_group)

    def processes(self) -> dict[int, subprocess.Popen]:
        """The process of each rank on this node."""
        handlers = self._pcontext.subprocess_handlers if self._pcontext else {}
        return {self.ranks[local]: handler.proc for local, handler in handlers.items()}

    def exits(self) -> dict[int, int]:
        """The exit code of each rank that has ended (negative: the signal that killed it)."""
        codes = {rank: process.poll() for rank, process in self.processes().items()}
        return {rank: code for rank, code in codes.items() if code is not None}

    def ask_to_stop(self) -> None:
        """Ask every rank that has not been asked to finish its step and save."""
        for process in self.processes().values():
            if process.pid not in self._stop_requested and process.poll() is None:
                self._stop_requested.add(process.pid)
                process.send_signal(signal.SIGUSR1)

    def end(self) -> list[int]:
        """Kill the ranks and their child processes; returns the ranks that did not end within `_END_S` seconds."""
        processes, deadline = self.processes(), time.monotonic() + _END_S
        for process in processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # every rank leads a process group of its own
        for process in processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        left = [rank for rank, process in processes.items() if process.poll() is None]
        if not left and self._pcontext is not None:
            self._pcontext.close(signal.SIGKILL, 1)
        return left
