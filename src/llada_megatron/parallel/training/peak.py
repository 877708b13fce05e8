"""What this machine can do: measured matrix-product and copy ceilings, and the memory a process has used."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from llada_megatron.llada_moe.config.training import TrainingConfig

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes in a unit of `ru_maxrss`."""

_FIRST_SIZE = 256

_LARGEST_SIZE = {"cpu": 2048, "cuda": 8192}

PRECISION_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float8_e4m3fn: "FP8"}
"""What people call the type of a product's operands."""

_SECONDS = 0.5  # time spent per ceiling; only the first, smallest measurement may take longer


def product_types(training: TrainingConfig) -> list[torch.dtype]:
    """The types whose ceiling a run is measured against: the first that the device has."""
    usual = torch.bfloat16 if training.precision == "bf16" else torch.float32
    return [usual] if training.fp8 is None else [torch.float8_e4m3fn, usual]


def has_product(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this type on this device."""
    try:
        _product(_FIRST_SIZE, torch.device(device), dtype)()
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


def matmul_peak(device: torch.device | str, dtype: torch.dtype, seconds: float = _SECONDS) -> float:
    """FLOP/s of a square matrix product with this process's threads: the best of several runs in about `seconds`.

    The size doubles from 256 as long as the next one fits into that time: a processor without instructions for
    `dtype` (bf16 on one with AVX2 only) is a thousand times slower than one with them, and must not be waited for.

    The ceiling that model-FLOPs utilisation is measured against; of FP8 with one scale a matrix and fast accumulation,
    which is the fastest that an FP8 product can be. Where ranks share a CPU, let them measure at the
    same time: each then gets the share it will have in training.
    """
    device = torch.device(device)
    best, size, deadline = 0.0, _FIRST_SIZE, time.perf_counter() + seconds
    while True:
        product = _product(size, device, dtype)
        once = _seconds(product, device)
        larger = 2 * size <= _LARGEST_SIZE.get(device.type, _FIRST_SIZE)
        if not (larger and time.perf_counter() + 2 * 8 * once < deadline):  # warm-up and one run of the next size
            return max(best, 2.0 * size**3 / min(once, _best_seconds(product, device, deadline)))
        best, size = max(best, 2.0 * size**3 / once), 2 * size


def copy_peak(device: torch.device | str) -> float:
    """Bytes/s read and written by a large copy with this process's threads: the best of several runs."""
    device = torch.device(device)
    count = (1024 if device.type == "cuda" else 64) * 2**20 // 4
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    deadline = time.perf_counter() + _SECONDS
    seconds = _seconds(lambda: target.copy_(source), device)
    return 2.0 * 4 * count / min(seconds, _best_seconds(lambda: target.copy_(source), device, deadline))


def _product(size: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    a = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    if dtype == torch.float8_e4m3fn:
        scale, columns = torch.ones((), device=device), a.clone().t()  # FP8 products take rows by columns
        return lambda: torch._scaled_mm(a, columns, scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True)
    b, out = a.t().contiguous(), torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run after a warm-up."""
    run()
    return timed(run, device)


def _best_seconds(run: Callable[[], object], device: torch.device, deadline: float) -> float:
    """The least of as many runs as begin before the deadline; infinite for none."""
    best = float("inf")
    while time.perf_counter() < deadline:
        best = min(best, timed(run, device))
    return best


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds from an idle device until it has done all that `run` gives it."""
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - start


def device_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds that one of several calls takes the device when the host is ahead of it, as in a training step.

    Large products keep the device busy until the host has given it all calls: at most `repeats`, fewer where they fill
    the device's queue, so that the host has to wait. Not a number where the host was late even with one. Without CUDA
    the mean time on the clock.
    """
    alone = timed(run, device)
    if device.type != "cuda":
        return timed(lambda: [run() for _ in range(repeats)], device) / repeats
    product = _product(_LARGEST_SIZE["cuda"], device, torch.bfloat16)
    once = _seconds(product, device)
    while repeats > 0:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(1 + int(3 * repeats * alone / once)):
            product()
        begin.record()
        for _ in range(repeats):
            run()
        ahead = not begin.query()
        end.record()
        end.synchronize()
        if ahead:
            return begin.elapsed_time(end) / 1000 / repeats
        repeats //= 2
    return math.nan


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
