"""The agent of one node of a job: `python -m llada_megatron.launch.cluster.agent JOB`, one per node under srun.

All agents start the ranks of their node, watch them and end them together. The one on the first node decides what
follows (decisions.py) and writes the verdict that the job's script acts on; the others wait for the next rendezvous,
which it either joins or closes.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from pathlib import Path

from llada_megatron.launch.cluster.agent.stop_signals import StopSignals
from llada_megatron.launch.cluster.config import load_cluster
from llada_megatron.launch.cluster.job import JobDirectory, Verdict, VerdictStatus
from llada_megatron.launch.cluster.node import Node
from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.errors import ConfigError, LladaError


def main(job: str) -> int:
    """Be the agent of this node; returns the exit code, which nobody needs: the job's script acts on the verdict."""
    directory = JobDirectory(Path(job).absolute())
    stop = StopSignals(directory.stop).listen()  # before torch is imported: that takes seconds
    node = Node.here(directory)
    try:
        with tempfile.TemporaryDirectory(prefix="llada-agent-", ignore_cleanup_errors=True) as scratch:
            return _work(node, stop, Path(scratch))
    except LladaError as error:
        return _give_up(node, str(error), "failed" if isinstance(error, ConfigError) else "requeue")


def _work(node: Node, stop: StopSignals, scratch: Path) -> int:
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost connection is reported in one line, not with a stack
    from torch.distributed import DistError
    from torch.distributed.elastic.rendezvous import RendezvousError

    from llada_megatron.launch.cluster.agent.job_attempt import JobAttempt
    from llada_megatron.launch.cluster.rendezvous import open_store

    _log_elastic(node.job.path / "agents" / f"{node.name}.log")
    run, cluster = load_run(node.job.run), load_cluster(node.job.cluster)
    attempt = JobAttempt(node, run, cluster, stop)
    try:
        attempt.work(open_store(node, cluster.rendezvous_timeout_s, lambda: stop.requested), scratch)
    except (DistError, RendezvousError) as error:
        who = "the rendezvous of the nodes failed" if node.first else "the first node no longer answers"
        return _give_up(node, f"{who} ({type(error).__name__}: {error})", "requeue")
    return 0


def _give_up(node: Node, why: str, status: VerdictStatus) -> int:
    """End the agent because of an error; the first node's agent writes the verdict."""
    node.say(f"error: {why}")
    node.event("fault", kind="error", on=node.name, rank=None, what=why)
    if node.first:
        node.job.write_verdict(node.attempt, Verdict(status, why))
        node.event("end", word=status, reason=why, asked=False)
    return 1


def _log_elastic(path: Path) -> None:
    """Send torch elastic's own lines to a file: the agents report the same events more clearly in the job's output."""
    path.parent.mkdir(exist_ok=True)
    logger = logging.getLogger("torch.distributed")
    logger.handlers, logger.propagate = [logging.FileHandler(path)], False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
