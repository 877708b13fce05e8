"""What this machine can do: measured matrix-product and copy ceilings, and the memory a process has used."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in a unit of `ru_maxrss`."""
_CPU_SIZE, _CUDA_SIZE = 2048, 8192
_SECONDS = 0.3  # time spent per ceiling, after warm-up


def matmul_peak(device: torch.device | str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product with this process's threads: the best of several runs.

    The ceiling that model-FLOPs utilisation is measured against. Where ranks share a CPU, let them measure at the
    same time: each then gets the share it will have in training.
    """
    device = torch.device(device)
    size = _CUDA_SIZE if device.type == "cuda" else _CPU_SIZE
    a = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    b, out = a.t().contiguous(), torch.empty_like(a)
    return 2.0 * size**3 / _best_seconds(lambda: torch.mm(a, b, out=out), device)


def copy_peak(device: torch.device | str) -> float:
    """Bytes/s read and written by a large copy with this process's threads: the best of several runs."""
    device = torch.device(device)
    count = (1024 if device.type == "cuda" else 64) * 2**20 // 4
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    return 2.0 * 4 * count / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    run()
    best, deadline = float("inf"), time.perf_counter() + _SECONDS
    while best == float("inf") or time.perf_counter() < deadline:
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_gb(device: torch.device | str = "cpu") -> float:
    """Largest memory so far, in GB (1e9 bytes): allocated on a CUDA device, else resident in this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "linux":  # ru_maxrss there begins with what the process that started this one had used
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 1e9


def total_memory_gb() -> float:
    """Physical memory of this machine, in GB."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
