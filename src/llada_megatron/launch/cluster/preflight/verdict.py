"""Whether a job can train on its nodes, judged by their reports. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llada_megatron.launch.cluster.job import Verdict

if TYPE_CHECKING:
    from llada_megatron.launch.cluster.config import ClusterConfig
    from llada_megatron.launch.cluster.preflight.node_report import NodeReport

_FREE_SHARE = 0.9
"""Share of a GPU's memory: where less than this is free, another process uses the GPU."""


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one node."""

    node: str
    kind: str
    """`devices`, `disk`, …: where all nodes have a finding of the same kind, no single node is at fault."""
    text: str

    def __str__(self) -> str:
        return f"{self.node}: {self.text}"


def findings(report: NodeReport, skew_s: float, cluster: ClusterConfig) -> list[Finding]:
    """Everything that is wrong with one node.

    Args:
        skew_s: how far its clock is ahead of the others', in seconds.
    """
    limits, found = cluster.preflight, []

    def note(kind: str, text: str) -> None:
        found.append(Finding(report.node, kind, text))

    if report.error:
        note("devices", report.error)
    elif len(report.gpus) != cluster.gpus:
        expected = f"{cluster.gpus} (gpus_per_node of the cluster file)"
        note("number", f"{len(report.gpus)} GPUs, expected {expected}")
    devices = {f"GPU {index}": gpu for index, gpu in enumerate(report.gpus)} | {"CPU": report.cpu or {}}
    for name, device in devices.items():
        for text in _broken(device):
            note("devices", f"{name} {text}")
        if device.get("tflops", limits.min_matmul_tflops) < limits.min_matmul_tflops:
            speed = f"{device['tflops']:g} TFLOP/s in a matrix product, expected {limits.min_matmul_tflops:g}"
            note("speed", f"{name} reaches {speed}")
    if report.memory_gb < limits.min_memory_gb:
        note("memory", f"{report.memory_gb:.1f} GB of memory free, expected {limits.min_memory_gb:g}")
    for disk in report.disks:
        if disk.error:
            note("disk", f"cannot write in {disk.path}: {disk.error}")
        elif disk.free_gb < limits.min_free_disk_gb:
            note("disk", f"{disk.free_gb:.2f} GB free in {disk.path}, expected {limits.min_free_disk_gb:g}")
    if abs(skew_s) > limits.max_clock_skew_s:
        note("clock", f"its clock is {skew_s:+.1f} s from the others', expected {limits.max_clock_skew_s:g} at most")
    return found


def _broken(device: Mapping[str, Any]) -> list[str]:
    """What is wrong with a GPU or CPU; each text follows its name in a sentence."""
    if "error" in device:
        return [f"fails: {device['error']}"]
    found = []
    if "total_gb" in device and device["free_gb"] < _FREE_SHARE * device["total_gb"]:
        found.append(f"has {device['free_gb']:.1f} of {device['total_gb']:.1f} GB free: another process uses it")
    if not device.get("exact", True):
        found.append("computes a wrong matrix product")
    return found


def differences(reports: Sequence[NodeReport]) -> list[str]:
    """One line for each version that is not the same on all nodes; nodes with an `error` are skipped."""
    answered = [report for report in reports if not report.error]
    names = sorted({name for report in answered for name in report.versions})
    lines = []
    for name in names:
        nodes: dict[str, list[str]] = {}
        for report in answered:
            nodes.setdefault(report.versions.get(name, "missing"), []).append(report.node)
        if len(nodes) > 1:
            lines.append(f"{name}: " + "; ".join(f"{value} on {', '.join(on)}" for value, on in nodes.items()))
    return lines


def skews_from_median(clocks: Mapping[int, float]) -> dict[int, float]:
    """How far each clock is ahead of the median clock, in seconds; with fewer than three nodes, of the first node's."""
    median = statistics.median(clocks.values()) if len(clocks) > 2 else clocks[0]
    return {index: clock - median for index, clock in clocks.items()}


def judge(found: Sequence[Finding], differing: Sequence[str], nodes: Sequence[str]) -> Verdict | None:
    """The verdict that keeps the job from training now; None when nothing is wrong."""
    if differing:
        return Verdict("failed", "the nodes' environments differ: " + " | ".join(differing))
    if not found:
        return None
    bad = [node for node in nodes if any(finding.node == node for finding in found)]
    reason = "; ".join(map(str, found))
    if len(nodes) == 1 and all(finding.kind == "devices" for finding in found):  # no comparison is needed
        return Verdict("exclude", reason, tuple(bad))
    if len(bad) == len(nodes) or any(_on_all(kind, found, nodes) for kind in {each.kind for each in found}):
        return Verdict("failed", f"on every node, so no other node would help: {reason}")
    if 2 * len(bad) > len(nodes):
        return Verdict("requeue", f"on most nodes, so the cause is not the nodes but what they share: {reason}")
    return Verdict("exclude", reason, tuple(bad))


def _on_all(kind: str, found: Sequence[Finding], nodes: Sequence[str]) -> bool:
    return len({finding.node for finding in found if finding.kind == kind}) == len(nodes)


def unreachable(size: int, failed_pairs: Sequence[tuple[int, int]], pairs: Sequence[tuple[int, int]]) -> list[int]:
    """Nodes of which every pair has failed, where other pairs have not; empty where all nodes are such nodes."""
    bad = [node for node in range(size) if all(pair in failed_pairs for pair in pairs if node in pair)]
    return bad if len(bad) < size else []


def pairs_of(size: int) -> list[list[tuple[int, int]]]:
    """Rounds of disjoint pairs in which each of at least three nodes is paired with both its neighbours in a ring."""
    if size < 3:
        return []
    ring = [(node, (node + 1) % size) for node in range(size)]
    rounds = [ring[0 : size - size % 2 : 2], ring[1::2] if size % 2 == 0 else ring[1 : size - 1 : 2]]
    return [*rounds, [ring[-1]]] if size % 2 else rounds


def slowest(results: Sequence[Mapping[str, Any]]) -> str:
    """The longest time of an all-reduce by each backend, and the least bandwidth, as part of a line."""
    times: dict[str, float] = {}
    for result in results:
        for backend, seconds in result.get("seconds", {}).items():
            times[backend] = max(seconds, times.get(backend, 0.0))
    speeds = [result["gb_s"] for result in results if "gb_s" in result]
    texts = [f"{backend} {seconds:g} s" for backend, seconds in times.items()]
    return ", ".join([*texts, *([f"then {min(speeds):g} GB/s"] if speeds else [])])


def describe(report: NodeReport, skew_s: float) -> str:
    """One line that describes a node."""
    if report.gpus and all("tflops" in gpu for gpu in report.gpus):
        speeds = [gpu["tflops"] for gpu in report.gpus]
        devices = f"{len(report.gpus)} x {report.gpus[0]['name']}, {min(speeds):.0f} to {max(speeds):.0f} TFLOP/s each"
    else:
        devices = f"{len(report.gpus)} GPUs" if report.cpu is None else f"CPU, {report.cpu['tflops']:g} TFLOP/s"
    disks = ", ".join(f"{disk.free_gb:.0f} GB free in {disk.path}" for disk in report.disks)
    return f"node {report.node}: {devices}; {report.memory_gb:.0f} GB of memory free; {disks}; clock {skew_s:+.1f} s"
