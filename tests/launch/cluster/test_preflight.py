"""The preflight: a bad node is named and excluded, a fault of all nodes ends the job, and a good job goes on."""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import replace

import pytest
import torch

from llada_megatron.launch.cluster.config import ClusterConfig, PreflightConfig
from llada_megatron.launch.cluster.job import JobDirectory, Verdict
from llada_megatron.launch.cluster.node import Node
from llada_megatron.launch.cluster.preflight import device_checks
from llada_megatron.launch.cluster.preflight.node_report import Disk, NodeReport
from llada_megatron.launch.cluster.preflight.verdict import (
    differences,
    findings,
    judge,
    pairs_of,
    skews_from_median,
    unreachable,
)
from llada_megatron.llada_moe.model.accelerations import Acceleration
from tests.launch.cluster.agents import Job

GPU = {"name": "H", "free_gb": 79.0, "total_gb": 80.0, "exact": True, "tflops": 600.0}
CLUSTER = ClusterConfig(ranks_per_node=2, gpus_per_node=2, preflight=PreflightConfig(min_matmul_tflops=500))
WELL = NodeReport("n0", 100.0, [Disk("out", 50.0, None)], {"torch": "2.13.0"}, gpus=[GPU, GPU])


def texts(report: NodeReport, skew_s: float = 0.0) -> list[str]:
    return [finding.text for finding in findings(report, skew_s, CLUSTER)]


def test_each_fault_is_named_with_what_was_expected():
    assert texts(WELL) == []
    assert texts(replace(WELL, gpus=[GPU])) == ["1 GPUs, expected 2 (gpus_per_node of the cluster file)"]
    assert "GPU 1 computes a wrong matrix product" in texts(replace(WELL, gpus=[GPU, GPU | {"exact": False}]))
    assert (
        "reaches 90 TFLOP/s in a matrix product, expected 500"
        in texts(replace(WELL, gpus=[GPU, GPU | {"tflops": 90}]))[0]
    )
    assert "12.0 of 80.0 GB free: another process" in texts(replace(WELL, gpus=[GPU, GPU | {"free_gb": 12.0}]))[0]
    assert texts(replace(WELL, disks=[Disk("out", 0.2, None)])) == ["0.20 GB free in out, expected 1"]
    assert texts(replace(WELL, disks=[Disk("out", 0, "No space left on device")]))[0].endswith(
        "No space left on device"
    )
    assert "-9.0 s from the others'" in texts(WELL, -9.0)[0]
    assert texts(replace(WELL, error="no answer within 9 s")) == ["no answer within 9 s"]


def test_one_bad_node_is_left_out_but_not_all_of_them():
    bad = findings(replace(WELL, node="n1", gpus=[GPU]), 0.0, CLUSTER)
    everywhere = bad + findings(replace(WELL, gpus=[GPU]), 0.0, CLUSTER)
    assert judge([], [], ["n0", "n1"]) is None
    verdict = judge(bad, [], ["n0", "n1"])
    assert verdict is not None and (verdict.status, verdict.nodes) == ("exclude", ("n1",))
    assert judge(everywhere, [], ["n0", "n1"]).status == "failed"
    differ = differences([WELL, replace(WELL, node="n1", versions={"torch": "2.12.0"})])
    assert differ == ["torch: 2.13.0 on n0; 2.12.0 on n1"]
    assert judge(bad, differ, ["n0", "n1"]).status == "failed"


def test_a_node_whose_transformer_engine_is_broken_is_named(monkeypatch):
    reports = []
    for node, state in (
        ("n0", Acceleration(True, "linear layers", "2.20.2")),
        ("n1", Acceleration(False, "installed, but its import fails: ImportError: undefined symbol", "2.20.2")),
    ):
        monkeypatch.setattr(device_checks, "transformer_engine", lambda state=state: state)
        reports.append(replace(WELL, node=node, versions=device_checks.versions()))
    assert reports[0].versions["apex"]
    assert differences(reports) == [
        "Transformer Engine: 2.20.2: linear layers on n0; 2.20.2: installed, but its import fails: ImportError: "
        "undefined symbol on n1"
    ]


def test_what_most_nodes_have_is_not_their_fault_and_a_broken_device_is():
    nodes = [f"n{index}" for index in range(5)]
    full = [
        finding
        for node in nodes[:3]
        for finding in findings(replace(WELL, node=node, disks=[Disk("o", 0, None)]), 0, CLUSTER)
    ]
    assert judge(full, [], nodes).status == "requeue"
    assert judge(full[:2], [], nodes).status == "exclude"
    broken = findings(replace(WELL, error="no answer within 90 s"), 0, CLUSTER)
    assert judge(broken, [], ["n0"]).nodes == ("n0",)
    assert judge(findings(replace(WELL, gpus=[GPU]), 0, CLUSTER), [], ["n0"]).status == "failed"


def test_the_clock_that_is_wrong_is_named_even_the_first_nodes():
    assert skews_from_median({0: 0.0, 1: 60.0, 2: 60.5, 3: 60.0}) == {0: -60.0, 1: 0.0, 2: 0.5, 3: 0.0}
    assert skews_from_median({0: 0.0, 1: 60.0}) == {0: 0.0, 1: 60.0}


@pytest.mark.parametrize("size", [3, 4, 5, 8])
def test_pairs_name_the_node_that_reaches_nobody(size):
    pairs = [pair for groups in pairs_of(size) for pair in groups]
    for bad in range(size):
        failed = [pair for pair in pairs if bad in pair]
        assert bad in unreachable(size, failed, pairs)
    assert unreachable(size, pairs, pairs) == []


class FakeDeviceProcess:
    """All-reduces with node 2 fail."""

    def start(self, what: str, host: str, port: int, name: str, *rest: object) -> None:
        self._fails = name in ("all-0", "pairs-1-1", "pairs-2-2")

    def answer(self, limit_s: float) -> dict[str, object]:
        return {"error": "RuntimeError: timed out"} if self._fails else {"seconds": {"gloo": 0.1}}


class SlowLinks:
    """An all-reduce over the GPUs of node 1 alone is slow; all others are as they should be."""

    def start(self, what: str, host: str, port: int, name: str, *rest: object) -> None:
        self._speed = 90.0 if name == "alone-1" else 400.0

    def answer(self, limit_s: float) -> dict[str, object]:
        return {"seconds": {"nccl": 2.0}, "gb_s": self._speed}


def preflight(
    tmp_path, monkeypatch, nodes: int, there: range, timeout_s: int, devices=FakeDeviceProcess, **limits
) -> Verdict | None:
    """The verdict of a job of `nodes` nodes, those in `there` present, as threads of this process."""
    from llada_megatron.launch.cluster import rendezvous
    from llada_megatron.launch.cluster.preflight.coordinator import PreflightCoordinator, answer_coordinator
    from llada_megatron.launch.cluster.rendezvous import open_store

    raised: list[bool] = []
    monkeypatch.setattr(rendezvous, "raise_open_files", lambda: raised.append(True))
    monkeypatch.setenv("SLURM_STEP_NODELIST", f"n[0-{nodes - 1}]")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = JobDirectory(tmp_path)
    cluster = replace(CLUSTER, preflight=PreflightConfig(timeout_s=timeout_s, **limits))

    def take_part(index: int) -> None:
        node = Node(job, "17", 0, index, nodes, f"n{index}", "127.0.0.1", port)
        report, store = replace(WELL, node=node.name), open_store(node, 30)
        if node.first:
            PreflightCoordinator(node, cluster, store, devices(), time.monotonic() + timeout_s).run(report)
        else:
            answer_coordinator(node, store, devices(), report)

    threads = [threading.Thread(target=take_part, args=(index,)) for index in there]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(raised) == len(there)  # a store of many ranks holds more connections than the usual limit
    return job.read_verdict(0)


def test_a_silent_node_and_one_without_a_network_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "silent").mkdir()
    (tmp_path / "network").mkdir()
    silent = preflight(tmp_path / "silent", monkeypatch, 3, range(2), 2)
    assert silent is not None and (silent.status, silent.nodes) == ("exclude", ("n2",))
    assert "no answer within 2 s" in silent.reason
    network = preflight(tmp_path / "network", monkeypatch, 3, range(3), 20)
    assert network is not None and (network.status, network.nodes) == ("exclude", ("n2",)), network
    assert "timed out" in network.reason


def test_a_node_with_a_slow_link_between_its_gpus_is_left_out(tmp_path, monkeypatch, capsys):
    found = preflight(tmp_path, monkeypatch, 3, range(3), 20, SlowLinks, min_all_reduce_gb_s=300.0)
    assert found is not None and (found.status, found.nodes) == ("exclude", ("n1",)), found
    assert "over its GPUs: 90 GB/s, expected 300 (preflight.min_all_reduce_gb_s)" in found.reason
    (tmp_path / "measured").mkdir()
    assert preflight(tmp_path / "measured", monkeypatch, 3, range(3), 20, SlowLinks) is None
    said = capsys.readouterr().err
    assert "all-reduce over the GPUs of each node, with its connections: nccl 2 s, then 90 GB/s" in said
    assert "all-reduce over 3 nodes, with its connections: nccl 2 s, then 400 GB/s" in said


def test_every_gpu_of_a_node_takes_part_with_a_process_of_its_own(monkeypatch):
    """Node 1 of 4, with 8 GPUs, is ranks 8 to 15 of 32; what is told is the slowest of them."""
    from llada_megatron.launch.cluster.preflight import network_check

    asked, ended, faults = [], [], {}

    class OfOneGpu:
        def start(self, *request):
            self.gpu = request[-1]
            asked.append(request)

        def answer(self, limit_s):
            return faults.get(self.gpu, {"seconds": 2.0 + self.gpu, "gb_s": 300.0 - self.gpu})

        def end(self):
            ended.append(self.gpu)

    monkeypatch.setattr(network_check, "DeviceProcess", OfOneGpu)
    monkeypatch.setattr(network_check, "_of_gpus", [])
    monkeypatch.setattr(network_check.torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(network_check, "add_up", lambda *request: {"seconds": 0.5, "gb_s": 1.0})
    found = network_check.all_reduce("host", 7, "all-0", 1, 4, 60.0)
    assert found == {"seconds": {"gloo": 0.5, "nccl": 9.0}, "gb_s": 293.0}
    assert asked == [("add_up", "nccl", "host", 7, "all-0/gpus", 8 + gpu, 32, 60.0, gpu) for gpu in range(8)]
    assert network_check.all_reduce("host", 7, "alone-1", 0, 1, 60.0)["seconds"] == {"nccl": 9.0}
    faults[5] = {"error": "RuntimeError: NCCL error"}
    with pytest.raises(RuntimeError, match="GPU 5: RuntimeError: NCCL error"):
        network_check.all_reduce("host", 7, "again-0", 1, 4, 60.0)
    assert ended == [5]  # the others have torch imported and go on to the next round


def test_a_failed_all_reduce_leaves_room_for_the_next(monkeypatch):
    """Pairs of nodes are tried after all of them have failed, by the same process."""
    from llada_megatron.launch.cluster.preflight import network_check

    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True)
    monkeypatch.setattr(network_check, "_CPU_NUMBERS", 2**10)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda values: values.add_(1))
    with pytest.raises(RuntimeError, match="the sum over 1 ranks by gloo is wrong"):
        network_check.add_up("gloo", "127.0.0.1", store.port, "all", 0, 1, 20.0)
    monkeypatch.undo()
    found = network_check.add_up("gloo", "127.0.0.1", store.port, "pairs", 0, 1, 20.0)
    assert found["seconds"] >= 0 and found["gb_s"] == 0


@pytest.fixture(scope="module")
def hanging(tmp_path_factory):
    """A job whose first node's devices hang; the other node has sent its report. What follows takes 45 s of waiting."""
    folder = tmp_path_factory.mktemp("hanging")
    job = Job(folder, "run", cluster="preflight: {timeout_s: 60}\n")
    site = folder / "hang"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "hangs = sys.orig_argv[-1].endswith('preflight.device_process') and os.environ['SLURMD_NODENAME'] == 'n0'\n"
        "if hangs: time.sleep(600)\n"
    )
    try:
        job.start("preflight", PYTHONPATH=f"{site}:{os.environ.get('PYTHONPATH', '')}")
        job.until((job.directory.preflight(0) / "n1.json").exists)
        yield job
    finally:
        job.kill()


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("hanging")  # which waits meanwhile
def test_two_real_nodes(tmp_path):
    """All is well, and the port free for the agents; then another node's run differs; then the port is taken."""
    from torch.distributed import TCPStore

    well = Job(tmp_path, "well")
    other = Job(tmp_path, "other", "training.seed=4")
    try:
        well.start("preflight")
        assert well.ended() is None
        assert [event["ok"] for event in well.events("preflight")] == [True], well.said()
        assert "all-reduce over 2 nodes" in well.said()
        assert sorted(path.name for path in well.directory.preflight(0).iterdir()) == ["n0.json", "n1.json"]
        TCPStore("127.0.0.1", well.port, is_master=True, wait_for_workers=False)

        well.start("preflight", nodes=(0,))
        other.start("preflight", nodes=(1,), LLADA_RENDEZVOUS=f"127.0.0.1:{well.port}", LLADA_ATTEMPT="1")
        verdict = well.ended()
        assert verdict is not None and verdict.status == "failed", well.said()
        assert "environments differ: run.yaml" in verdict.reason

        with socket.create_server(("127.0.0.1", well.port)):  # a program that came after the script had looked
            well.start("preflight", nodes=(0,), LLADA_RENDEZVOUS=f"127.0.0.1:{well.port}")
            verdict = well.ended()
        assert verdict is not None and verdict.status == "requeue", well.said()
        assert "cannot connect" in verdict.reason
    finally:
        well.kill()
        other.kill()


@pytest.mark.timeout(900)
def test_a_first_node_whose_devices_hang_is_left_out(hanging):
    """It still hears the others, who would all count as silent otherwise."""
    verdict = hanging.ended()
    assert verdict is not None and (verdict.status, verdict.nodes) == ("exclude", ("n0",)), hanging.said()
