"""One all-reduce among nodes, as one process of each."""

from __future__ import annotations

import datetime
import time

import torch

_NUMBERS = 2**22


def all_reduce(host: str, port: int, name: str, rank: int, size: int, limit_s: float) -> dict[str, float]:
    """Seconds that the sum of 16 MiB from every node takes, with its connections, by backend.

    Args:
        name: keys of the store at `host` and `port` that no other all-reduce uses.

    Raises:
        RuntimeError: torch's own, or a wrong sum.
    """
    limit = datetime.timedelta(seconds=limit_s)
    store = torch.distributed.TCPStore(host, port, is_master=False, timeout=limit)
    backends = ["gloo", "nccl"] if torch.cuda.is_available() else ["gloo"]
    return {
        backend: _timed(backend, torch.distributed.PrefixStore(f"{name}/{backend}", store), rank, size, limit)
        for backend in backends
    }


def _timed(backend: str, store: torch.distributed.Store, rank: int, size: int, limit: datetime.timedelta) -> float:
    began = time.perf_counter()
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    values = torch.full((_NUMBERS,), float(rank + 1), device="cuda:0" if backend == "nccl" else "cpu")
    torch.distributed.all_reduce(values)
    if not bool((values == size * (size + 1) / 2).all()):
        raise RuntimeError(f"the sum over {size} nodes by {backend} is wrong")
    torch.distributed.destroy_process_group()
    return round(time.perf_counter() - began, 2)
