"""The all-reduces of the preflight: one process per node over the hosts' network, then one per GPU over all links.

A ring over all GPUs enters and leaves a node by each of its network cards, and passes each GPU's own links: a bad one
makes the sum fail or slow. One GPU per node would use one card and no link between GPUs.
"""

from __future__ import annotations

import datetime
import time
from typing import Any

import torch

from llada_megatron.launch.cluster.preflight.device_process import DeviceProcess
from llada_megatron.parallel.machine import choose_gloo_interface

_GPU_NUMBERS, _CPU_NUMBERS = 2**26, 2**22  # 256 MiB, 16 MiB

_REPEATS = 3

_of_gpus: list[DeviceProcess] = []
"""The process of each GPU, which has torch imported after the first all-reduce; they end with this one."""

_ANSWER_SHARE = 1.6
"""How many times the limit of an all-reduce a node may take for all of them; the coordinator waits for twice of it."""


def all_reduce(host: str, port: int, name: str, node: int, nodes: int, limit_s: float) -> dict[str, Any]:
    """Add up a tensor over nodes, and another over all their GPUs, where there are such.

    Args:
        host, port: address of the store that the nodes share.
        name: prefix of the keys in the store; each all-reduce needs another.
        node, nodes: which of how many nodes this one is.
        limit_s: seconds after which an all-reduce fails.

    Returns:
        `seconds` by backend, with making the connections, and `gb_s`, the bus bandwidth (10^9 bytes a second) of the
        last of them: 2 (n - 1) / n times the bytes of the tensor over the time of one all-reduce.

    Raises:
        RuntimeError: an all-reduce fails, or its sum is wrong.
    """
    began = time.monotonic()
    choose_gloo_interface(host)
    found: dict[str, Any] = {"seconds": {}}
    if nodes > 1:
        done = add_up("gloo", host, port, f"{name}/hosts", node, nodes, limit_s)
        found = {"seconds": {"gloo": done["seconds"]}, "gb_s": done["gb_s"]}
    gpus = torch.cuda.device_count()
    if gpus and nodes * gpus > 1:
        deadline = began + _ANSWER_SHARE * limit_s
        done = _over_gpus(host, port, f"{name}/gpus", node, nodes, gpus, limit_s, deadline)
        found = {"seconds": found["seconds"] | {"nccl": done["seconds"]}, "gb_s": done["gb_s"]}
    return found


def _over_gpus(
    host: str, port: int, name: str, node: int, nodes: int, gpus: int, limit_s: float, deadline: float
) -> dict[str, float]:
    """An all-reduce in which each GPU of each node takes part, with a process of its own; the slowest of this node."""
    _of_gpus.extend(DeviceProcess() for _ in range(gpus - len(_of_gpus)))
    for gpu, process in enumerate(_of_gpus):
        process.start("add_up", "nccl", host, port, name, node * gpus + gpu, nodes * gpus, limit_s, gpu)
    answers = [process.answer(max(1.0, deadline - time.monotonic())) for process in _of_gpus]
    failed = {gpu: answer["error"] for gpu, answer in enumerate(answers) if "error" in answer}
    for gpu in failed:
        _of_gpus[gpu].end()  # its communicator may be in any state
    if failed:
        raise RuntimeError("; ".join(f"GPU {gpu}: {error}" for gpu, error in failed.items()))
    return {
        "seconds": max(answer["seconds"] for answer in answers),
        "gb_s": min(answer["gb_s"] for answer in answers),
    }


def add_up(
    backend: str, host: str, port: int, name: str, rank: int, size: int, limit_s: float, gpu: int | None = None
) -> dict[str, float]:
    """Take part in an all-reduce as `rank` of `size`, on a GPU or the CPU; `seconds` and `gb_s` as for `all_reduce`.

    Raises:
        RuntimeError: torch reports an error, or the sum is wrong.
    """
    began = time.perf_counter()
    limit = datetime.timedelta(seconds=limit_s)
    store = torch.distributed.TCPStore(host, port, is_master=False, timeout=limit)
    if gpu is not None:
        torch.cuda.set_device(gpu)
    torch.distributed.init_process_group(
        backend, store=torch.distributed.PrefixStore(name, store), rank=rank, world_size=size, timeout=limit
    )
    try:
        device, numbers = ("cpu", _CPU_NUMBERS) if gpu is None else (f"cuda:{gpu}", _GPU_NUMBERS)
        values = torch.full((numbers,), float(rank + 1), device=device)
        torch.distributed.all_reduce(values)
        if not bool((values == size * (size + 1) / 2).all()):
            raise RuntimeError(f"the sum over {size} ranks by {backend} is wrong")
        connected = time.perf_counter()
        for _ in range(_REPEATS):
            torch.distributed.all_reduce(values)
        values[0].item()  # waits for a GPU
        once = (time.perf_counter() - connected) / _REPEATS
    finally:
        torch.distributed.destroy_process_group()  # the next round makes another
    moved = 2 * (size - 1) / size * values.nbytes
    return {"seconds": round(connected - began, 2), "gb_s": round(moved / once / 1e9, 3)}
