"""What the device process looks at with torch: the memory and a matrix product of each device, and the versions."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from pathlib import Path
from typing import Any

import torch

from llada_megatron.llada_moe.model.accelerations import apex, in_words, transformer_engine
from llada_megatron.parallel.machine import driver_fault

_GPU_SIZE, _CPU_SIZE = 8192, 1024

_MEASURE_S = 0.3

_DRIVER = Path("/proc/driver/nvidia/version")


def matmul(device: torch.device) -> dict[str, Any]:
    """Compute a matrix product whose result is known exactly: whether it was `exact`, and its speed in `tflops`.

    Row i of the left factor is i mod 7 - 3 throughout, column j of the right one j mod 5 - 2, and the width is a power
    of two: every entry of the product is exact in bfloat16 as well.
    """
    size, dtype = (_GPU_SIZE, torch.bfloat16) if device.type == "cuda" else (_CPU_SIZE, torch.float32)
    rows = (torch.arange(size, device=device) % 7 - 3).to(dtype)
    columns = (torch.arange(size, device=device) % 5 - 2).to(dtype)
    left, right = rows[:, None].expand(size, size).contiguous(), columns[None, :].expand(size, size).contiguous()
    right_result = torch.equal(left @ right, size * rows[:, None] * columns[None, :])
    done, began = 0, time.perf_counter()
    while time.perf_counter() - began < _MEASURE_S:
        for _ in range(4):
            left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done += 4
    tflops = 2 * size**3 * done / (time.perf_counter() - began) / 1e12
    return {"exact": right_result, "tflops": round(tflops, 3)}


def gpu(index: int) -> dict[str, Any]:
    """Name, memory (GB) and matrix product of one GPU, or the `error` that it gives."""
    try:
        free, total = torch.cuda.mem_get_info(index)
        found = {"name": torch.cuda.get_device_name(index), "free_gb": free / 1e9, "total_gb": total / 1e9}
        return found | matmul(torch.device("cuda", index))
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}


def versions() -> dict[str, str]:
    """Versions of the software that must be the same on all nodes; of libraries that a run would use if it could, also
    whether it can, and why not."""
    found = {name: _installed(name) for name in ("torch", "megatron-core", "llada-megatron")}
    found |= {"python": platform.python_version(), "torch's CUDA": torch.version.cuda or "none"}
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    found |= {"Transformer Engine": in_words(transformer_engine()), "apex": in_words(apex())}
    if _DRIVER.is_file():
        found["NVIDIA driver"] = _DRIVER.read_text().splitlines()[0]
    return found


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def look() -> dict[str, Any]:
    """This node's devices and the versions of their software: the `gpus`, `cpu` and `versions` of a `NodeReport`.

    Raises:
        RuntimeError: there are GPUs, and torch cannot use their driver.
    """
    fault = driver_fault()
    if fault:
        raise RuntimeError(fault)
    gpus = [gpu(index) for index in range(torch.cuda.device_count())]
    cpu = None if gpus else matmul(torch.device("cpu"))
    return {"gpus": gpus, "cpu": cpu, "versions": versions()}
