"""The preflight of one node: `python -m llada_megatron.launch.cluster.preflight JOB`, one per node under srun.

Every node examines itself and sends its report to the first node, which names what is wrong and writes the verdict.
Where nothing is wrong, all nodes add up a tensor together. The reports stay in JOB/preflight-ATTEMPT/NODE.json.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.launch.cluster.config import load_cluster
from llada_megatron.launch.cluster.job import JobDirectory, Verdict
from llada_megatron.launch.cluster.node import Node
from llada_megatron.launch.cluster.preflight.device_process import DeviceProcess
from llada_megatron.launch.cluster.preflight.node_report import make_report
from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.errors import LladaError

if TYPE_CHECKING:
    from llada_megatron.launch.cluster.config import ClusterConfig
    from llada_megatron.launch.cluster.preflight.node_report import NodeReport

_DEVICES_SHARE = 0.75
"""Share of the time limit that devices have for their answer: the first node needs the rest to collect the reports of
the others, even when its own devices hang."""


def main(job: str) -> int:
    """Check this node; returns the exit code, which nobody needs: the job's script acts on the verdict."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before the import of torch; no warning when a store ends
    node = Node.here(JobDirectory(Path(job).absolute()))
    try:
        run, cluster = load_run(node.job.run), load_cluster(node.job.cluster)
    except LladaError as error:
        if node.first:
            node.say(f"error: {error}")
            node.job.write_verdict(node.attempt, Verdict("failed", f"the job's configuration is not valid: {error}"))
        return 1
    began, limit = time.monotonic(), cluster.preflight.timeout_s
    device_process = DeviceProcess()
    report = make_report(node.name, run.output_dir, node.job.run, device_process, began + _DEVICES_SHARE * limit)
    folder = node.job.preflight(node.attempt)
    folder.mkdir(exist_ok=True)
    (folder / f"{node.name}.json").write_text(replace(report, time=time.time()).to_json(), "utf-8")
    return _with_other_nodes(node, cluster, report, device_process, began + limit)


def _with_other_nodes(
    node: Node, cluster: ClusterConfig, report: NodeReport, device_process: DeviceProcess, deadline: float
) -> int:
    from torch.distributed import DistError

    from llada_megatron.launch.cluster.preflight.coordinator import PreflightCoordinator, answer_coordinator
    from llada_megatron.launch.cluster.rendezvous import open_store

    try:
        store = open_store(node, max(1.0, deadline - time.monotonic()))
        if node.first:
            PreflightCoordinator(node, cluster, store, device_process, deadline).run(report)
        else:
            answer_coordinator(node, store, device_process, report)
    except (DistError, LladaError) as error:
        why = f"error in the preflight: {error}"
        node.say(why)
        if node.first:  # most likely another program took the port; the next attempt has another
            node.job.write_verdict(node.attempt, Verdict("requeue", why))
        return 1
    finally:
        device_process.end()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
