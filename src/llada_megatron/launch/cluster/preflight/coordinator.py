"""The preflight among nodes: the first one collects their reports, has them add up a tensor, and decides."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llada_megatron.launch.cluster.job import Verdict, VerdictStatus
from llada_megatron.launch.cluster.preflight.node_report import NodeReport
from llada_megatron.launch.cluster.preflight.verdict import (
    Finding,
    describe,
    differences,
    findings,
    judge,
    pairs_of,
    skews_from_median,
    slowest,
    unreachable,
)

if TYPE_CHECKING:
    from torch.distributed import Store

    from llada_megatron.launch.cluster.config import ClusterConfig
    from llada_megatron.launch.cluster.node import Node
    from llada_megatron.launch.cluster.preflight.device_process import DeviceProcess

_POLL_S = 0.05

_GOODBYE_S = 10.0

_END, _ALL, _ALONE = "end", "all", "alone"
"""Names of rounds: the last one, one all-reduce over all nodes, and one in each node by itself."""


class PreflightCoordinator:
    """What the first node does: collect the reports of all nodes, test the network between them, write the verdict."""

    def __init__(
        self, node: Node, cluster: ClusterConfig, store: Store, device_process: DeviceProcess, deadline: float
    ) -> None:
        self._node, self._cluster, self._store, self._device_process = node, cluster, store, device_process
        self._deadline = deadline

    def run(self, mine: NodeReport) -> None:
        """Check all nodes, print a line for each, and write a verdict where the job cannot train on them.

        Args:
            mine: the report of the first node itself.
        """
        try:
            verdict = self._check_nodes(mine)
        finally:
            self._release_nodes()
        faults = verdict.reason if verdict else None
        spent = self._cluster.preflight.timeout_s - (self._deadline - time.monotonic())
        self._node.event("preflight", ok=verdict is None, faults=faults, seconds=round(spent, 1))
        if verdict is not None:
            self._node.say(
                f"{verdict.status}{' ' if verdict.nodes else ''}{', '.join(verdict.nodes)}: {verdict.reason}"
            )
            self._node.job.write_verdict(self._node.attempt, verdict)

    def _check_nodes(self, mine: NodeReport) -> Verdict | None:
        names = self._node.names()
        reports, skews = self._collect_reports(mine)
        found = [
            Finding(names[index], "silent", self._no_answer())
            for index in range(self._node.count)
            if index not in reports
        ]
        for index, report in sorted(reports.items()):
            self._node.say(describe(report, skews[index]))
            found += findings(report, skews[index], self._cluster)
        for finding in found:
            self._node.say(f"fault on {finding}")
        verdict = judge(found, differences(list(reports.values())), names)
        return verdict or self._all_reduce_in_each(names) or (self._all_reduce(names) if len(names) > 1 else None)

    def _no_answer(self) -> str:
        return f"no answer within {self._cluster.preflight.timeout_s} s"

    def _collect_reports(self, mine: NodeReport) -> tuple[dict[int, NodeReport], dict[int, float]]:
        """The reports of the nodes that have answered, by node number, and how far ahead each clock is, in seconds."""
        self._store.set("collecting", "")
        reports, skews = {0: mine}, {0: 0.0}
        while len(reports) < self._node.count and time.monotonic() < self._deadline:
            for index in set(range(self._node.count)) - reports.keys():
                if self._store.check([f"report/{index}"]):
                    reports[index] = NodeReport.from_json(self._store.get(f"report/{index}"))
                    skews[index] = reports[index].time - time.time()
            time.sleep(_POLL_S)
        return reports, skews_from_median(skews)

    def _all_reduce_in_each(self, names: Sequence[str]) -> Verdict | None:
        """Run an all-reduce over the GPUs of each node by itself, where they have several: it needs no network."""
        if self._cluster.gpus < 2:
            return None
        errors = self._all_reduce_in_groups(_ALONE, [(index,) for index in range(self._node.count)])
        found = [
            Finding(names[index], "devices", f"an all-reduce over its GPUs: {error}")
            for index, error in sorted(errors.items())
        ]
        return judge(found, [], names)

    def _all_reduce(self, names: Sequence[str]) -> Verdict | None:
        """Run an all-reduce over all nodes; where it fails, all-reduces of pairs show which node is the cause."""
        size = self._node.count
        errors = self._all_reduce_in_groups(_ALL, [tuple(range(size))])
        if not errors:
            return None
        said = "; ".join(f"{names[index]}: {error}" for index, error in sorted(errors.items()))
        failed, pairs = [], []
        for number, groups in enumerate(pairs_of(size)):
            bad = self._all_reduce_in_groups(f"pairs-{number}", groups)
            pairs += groups
            failed += [pair for pair in groups if set(pair) & bad.keys()]
        found = [names[index] for index in unreachable(size, failed, pairs)] if failed else []
        if found:
            return Verdict("exclude", f"an all-reduce with {', '.join(found)} fails ({said})", tuple(found))
        # In the first attempt the cluster file is the likely cause; a network that has worked before may work again.
        status: VerdictStatus = "requeue" if self._node.attempt else "failed"
        return Verdict(status, f"an all-reduce over the nodes fails, and no single node is to blame ({said})")

    def _all_reduce_in_groups(self, name: str, groups: Sequence[tuple[int, ...]]) -> dict[int, str]:
        """Have the nodes run all-reduces in groups; returns the error of each node whose all-reduce failed.

        Args:
            name: key of this round in the store; each round needs another.
            groups: numbers of the nodes that form each group.
        """
        limit = float(self._cluster.preflight.timeout_s)
        self._store.set("round", json.dumps([name, groups, limit]))
        waiting = {index for group in groups for index in group}
        results = (
            {0: all_reduce_in_group(self._node, self._device_process, name, groups, limit)} if 0 in waiting else {}
        )
        deadline = time.monotonic() + limit
        while waiting - results.keys() and time.monotonic() < deadline:
            for index in waiting - results.keys():
                if self._store.check([f"{name}/{index}"]):
                    results[index] = json.loads(self._store.get(f"{name}/{index}"))
            time.sleep(_POLL_S)
        errors = {index: self._fault(results.get(index, {"error": "no answer"})) for index in waiting}
        errors = {index: error for index, error in errors.items() if error}
        if not errors and name in (_ALL, _ALONE):
            where = f"over {len(waiting)} nodes" if name == _ALL else "over the GPUs of each node"
            self._node.say(f"all-reduce {where}, with its connections: {slowest(list(results.values()))}")
        return errors

    def _fault(self, result: Mapping[str, Any]) -> str | None:
        """Why a node's all-reduce is not good enough, or None."""
        least = self._cluster.preflight.min_all_reduce_gb_s
        if "error" not in result and result.get("gb_s", least) < least:
            return f"{result['gb_s']:g} GB/s, expected {least:g} (preflight.min_all_reduce_gb_s)"
        return result.get("error")

    def _release_nodes(self) -> None:
        """Serve the store until the other nodes have left; then its port is free for the agents."""
        self._store.set("round", json.dumps([_END, [], 0]))
        others = [f"bye/{index}" for index in range(1, self._node.count) if self._store.check([f"report/{index}"])]
        deadline = time.monotonic() + _GOODBYE_S
        while others and not self._store.check(others) and time.monotonic() < deadline:
            time.sleep(_POLL_S)


def answer_coordinator(node: Node, store: Store, device_process: DeviceProcess, report: NodeReport) -> None:
    """What every other node does: send its report to the first one, and run an all-reduce whenever that asks for one.

    Raises:
        DistError: the first node no longer answers.
    """
    while not store.check(["collecting"]):
        time.sleep(_POLL_S)
    store.set(f"report/{node.index}", replace(report, time=time.time()).to_json())
    done: set[str] = set()
    while _END not in done:
        time.sleep(_POLL_S)
        if not store.check(["round"]):
            continue
        name, groups, limit = json.loads(store.get("round"))
        if name not in done and name != _END:
            store.set(
                f"{name}/{node.index}", json.dumps(all_reduce_in_group(node, device_process, name, groups, limit))
            )
        done.add(name)
    store.set(f"bye/{node.index}", "")


def all_reduce_in_group(
    node: Node, device_process: DeviceProcess, name: str, groups: Sequence[Sequence[int]], limit_s: float
) -> dict[str, Any]:
    """Run an all-reduce with the other nodes of this node's group; returns `seconds` by backend, or `error`."""
    group = next((list(each) for each in groups if node.index in each), None)
    if group is None:
        return {}
    # The all-reduce has the shorter limit, so that its own error, which says what it waited for, arrives in time.
    device_process.start(
        "all_reduce", node.host, node.port, f"{name}-{group[0]}", group.index(node.index), len(group), limit_s / 2
    )
    return device_process.answer(limit_s)
