"""What a rank sets on its machine before it joins the others, and what it refuses there."""

from __future__ import annotations

import os
import resource
import socket
from types import SimpleNamespace

import pytest
import torch

from llada_megatron.launch.cluster.preflight import device_checks
from llada_megatron.launch.resources import check_machine
from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.parallel import device, machine, ranks, topology
from llada_megatron.tools import environment
from tests.ranks import run_ranks

TOO_OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver …"


def test_the_limit_of_open_files_becomes_the_hard_one(monkeypatch):
    limits = [1024, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda which, pair: limits.__setitem__(slice(2), list(pair)))
    assert machine.raise_open_files() == 4096 and limits == [4096, 4096]
    assert machine.raise_open_files(100) == 4096
    limits[:] = [1024, resource.RLIM_INFINITY]
    assert machine.raise_open_files(5000) == 5000
    assert machine.raise_open_files() is None


@pytest.mark.parametrize(
    ("address", "master", "given", "expected"),
    [
        ("127.0.1.1", "203.0.113.7", None, "eth1"),
        ("192.0.2.5", "203.0.113.7", None, None),  # the name stands for an address that others reach
        ("127.0.1.1", "127.0.0.1", None, None),  # all ranks are on this machine
        ("127.0.1.1", None, None, None),
        ("127.0.1.1", "203.0.113.7", "ib0", "ib0"),
        ("127.0.1.1", "node-1", None, "eth1"),  # this machine, by its name
        ("127.0.1.1", "localhost", None, None),
        ("127.0.1.1", "no-such-node", None, None),
    ],
)
def test_gloo_leaves_a_loopback_address_unless_the_user_has_chosen(monkeypatch, address, master, given, expected):
    class Probe:
        def __init__(self, *_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def connect(self, target):
            if target[0] == "no-such-node":
                raise OSError("Name or service not known")
            self.own = "127.0.0.1" if target[0].startswith(("127.", "node-1", "localhost")) else "192.0.2.5"

        def getsockname(self):
            return self.own, 40000

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", (address, 0))])
    monkeypatch.setattr(socket, "socket", Probe)
    interfaces = {"lo": [SimpleNamespace(address="127.0.0.1")], "eth1": [SimpleNamespace(address="192.0.2.5")]}
    monkeypatch.setattr(machine.psutil, "net_if_addrs", lambda: interfaces)
    monkeypatch.setenv(machine.INTERFACE_VARIABLE, "")  # so that the end of the test removes what is set
    monkeypatch.delenv(machine.INTERFACE_VARIABLE)
    if given:
        monkeypatch.setenv(machine.INTERFACE_VARIABLE, given)
    machine.choose_gloo_interface(master)
    assert os.environ.get(machine.INTERFACE_VARIABLE) == expected


def test_a_rank_stays_on_the_cores_near_its_gpu(monkeypatch, tmp_path):
    for place, uuid, cores in (("0000:1B:00.0", "aaaa", "0-3,8-11"), ("0000:cb:00.0", "bbbb", "4-7,12-15")):
        described = tmp_path / "proc/driver/nvidia/gpus" / place / "information"
        described.parent.mkdir(parents=True)
        described.write_text(f"Model: H\nGPU UUID: \t GPU-{uuid}\n")
        near = tmp_path / "sys/bus/pci/devices" / place.lower() / "local_cpulist"
        near.parent.mkdir(parents=True)
        near.write_text(cores + "\n")
    bound = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(10)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: bound.append(sorted(cores)))
    machine.bind_to_gpu("aaaa", tmp_path)
    machine.bind_to_gpu("bbbb", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    machine.bind_to_gpu("bbbb", tmp_path)  # the launcher has bound it elsewhere
    machine.bind_to_gpu("cccc", tmp_path)
    machine.bind_to_gpu("aaaa", tmp_path / "nothing")
    assert bound == [[0, 1, 2, 3, 8, 9], [4, 5, 6, 7]]


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """A machine with a driver, and a torch with CUDA whose initialisation fails with the text that is returned."""
    fails = [""]

    def init():
        raise RuntimeError(fails[0])

    (tmp_path / "version").write_text("NVRM version: …")
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", init)
    return fails


def test_a_driver_that_torch_cannot_use_is_told_and_not_passed_over(driver, monkeypatch, tmp_path):
    driver[0] = TOO_OLD
    fault = machine.driver_fault()
    assert fault is not None and "is too old (found version 12020); update the driver" in fault
    assert "built for CUDA 13.0" in fault and "\n" not in fault
    assert environment.devices()["why not CUDA"] == fault
    with pytest.raises(ResourceError, match=r"rank 0 on .*is too old \(found version 12020\)"):
        topology.join(0, 1, f"file://{tmp_path}/store")
    with pytest.raises(RuntimeError, match=r"is too old \(found version 12020\)"):
        device_checks.look()
    with pytest.raises(ResourceError, match=r"is too old \(found version 12020\)"):
        check_machine(load_run("demo"))
    for hidden in ("No CUDA GPUs are available", TOO_OLD):  # on purpose, whatever torch says of it
        driver[0] = hidden
        with monkeypatch.context() as patch:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            assert machine.driver_fault() is None
    with monkeypatch.context() as patch:  # a fork cannot ask; who forked it has
        patch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
        assert machine.driver_fault() is None
    driver[0] = "No CUDA GPUs are available"
    assert machine.driver_fault() is None
    monkeypatch.setattr(machine, "_DRIVER", tmp_path / "none")
    driver[0] = TOO_OLD
    assert machine.driver_fault() is None


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert topology.own_gpu(11, 4) == 3
    with pytest.raises(ResourceError, match=r"rank 11 is number 4 on .*, which has 2 GPUs for its processes"):
        topology.own_gpu(11, 2)
    monkeypatch.delenv("LOCAL_RANK")
    assert topology.own_gpu(11, 4) == 3


def nothing():
    return None


def test_ranks_of_the_benchmarks_are_new_processes_where_there_are_gpus(monkeypatch):
    """A fork of a process that has asked CUDA cannot use it; and each needs a GPU of its own."""
    monkeypatch.setattr(device, "cuda_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ranks, "_server", lambda: pytest.fail("no rank may be forked"))
    assert ranks._context(2).get_start_method() == "spawn"
    with pytest.raises(ResourceError, match="3 ranks need a GPU each, and this machine shows 2"):
        run_ranks(nothing, 3)


def test_every_rank_joins_as_a_training_does(monkeypatch):
    """`topology.join` sets the GPU and the backend; a rank that made its own group would have neither."""
    joined, sent = [], []
    monkeypatch.setattr(topology, "join", lambda *arguments: joined.append(arguments))
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "0")
    results = SimpleNamespace(send_bytes=sent.append, close=nothing)
    ranks._rank(ranks.pickle.dumps((nothing, ())), 1, 2, "/folder", 9.0, results)
    assert joined == [(1, 2, "file:///folder/store", 9.0)] and len(sent) == 1


def test_on_a_gpu_the_world_is_nccl_alone_and_connected_at_once(monkeypatch):
    """No gloo beside it: every group would inherit that, and connect all its ranks."""
    calls = []
    monkeypatch.setattr(device, "cuda_available", lambda: True)
    monkeypatch.setattr(device, "current", lambda: torch.device("cpu"))
    monkeypatch.setattr(machine, "prepare", lambda: calls.append("prepared"))
    monkeypatch.setattr(machine, "driver_fault", lambda: None)
    monkeypatch.setattr(machine, "bind_to_gpu", lambda uuid: calls.append(f"near {uuid}"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: calls.append(("gpu", number)))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid=f"GPU-{number}"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("waited"))
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **given: calls.append((backend, sorted(given)))
    )
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: calls.append("all_reduce"))
    topology.join(2, 8, "file:///store", 5.0)
    world = ("nccl", ["init_method", "rank", "timeout", "world_size"])
    assert calls == ["prepared", ("gpu", 2), "near GPU-2", world, "all_reduce", "waited"]
