"""What a node reports of itself: devices and that they compute what they should, memory, disks, versions."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

import llada_megatron
from llada_megatron.launch.cluster.preflight.device_process import DeviceProcess

_GPU_SIZE, _CPU_SIZE = 8192, 1024

_MEASURE_S = 0.3

_DRIVER = Path("/proc/driver/nvidia/version")


def matmul(device: torch.device) -> dict[str, Any]:
    """One matrix product whose result is known exactly, and how fast it is.

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
    """Name, memory (GB) and matrix product of one GPU, or the error that it gives."""
    try:
        free, total = torch.cuda.mem_get_info(index)
        facts = {"name": torch.cuda.get_device_name(index), "free_gb": free / 1e9, "total_gb": total / 1e9}
        return facts | matmul(torch.device("cuda", index))
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0]}


def versions() -> dict[str, str]:
    """What must be the same on all nodes."""
    found = {name: _installed(name) for name in ("torch", "megatron-core", "llada-megatron")}
    found |= {"python": platform.python_version(), "torch's CUDA": torch.version.cuda or "none"}
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    if _DRIVER.is_file():
        found["NVIDIA driver"] = _DRIVER.read_text().splitlines()[0]
    return found


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def look() -> dict[str, Any]:
    """The devices of this node and the versions that drive them; what `NodeFacts` takes."""
    gpus = [gpu(index) for index in range(torch.cuda.device_count())]
    cpu = None if gpus else matmul(torch.device("cpu"))
    return {"gpus": gpus, "cpu": cpu, "versions": versions()}


_PROBE = b"llada" * 200


@dataclass(frozen=True)
class Disk:
    """A directory that the run writes to."""

    path: str
    free_gb: float
    error: str | None
    """Why a small file could not be written and removed there."""


@dataclass(frozen=True)
class NodeReport:
    """What one node found of itself."""

    node: str
    memory_gb: float
    """Free host memory."""
    disks: list[Disk]
    versions: dict[str, str]
    gpus: list[dict[str, Any]] = field(default_factory=list)
    cpu: dict[str, Any] | None = None
    error: str | None = None
    """Why the devices could not be asked."""
    time: float = 0.0
    """This node's clock when it sent this (seconds since 1970)."""

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> NodeReport:
        """What `to_json` wrote."""
        values = json.loads(text)
        return cls(**values | {"disks": [Disk(**disk) for disk in values["disks"]]})


def gather(node: str, output_dir: str, run_file: Path, worker: DeviceProcess, deadline: float) -> NodeReport:
    """Look at this node; at its devices until `deadline` (seconds of the monotonic clock) at the latest."""
    worker.start("look")  # it imports torch while this process does the rest
    disks = [_disk(Path(output_dir)), _disk(Path(tempfile.gettempdir()))]
    versions = {"run.yaml": _digest([run_file]), "source of llada-megatron": source_digest()}
    memory = psutil.virtual_memory().available / 1e9
    import torch  # noqa: F401  (for the store; its seconds pass while the devices are looked at)

    found = worker.answer(max(1.0, deadline - time.monotonic()))
    if "error" in found:
        return NodeReport(node, memory, disks, versions, error=f"looking at its devices failed: {found['error']}")
    return NodeReport(node, memory, disks, versions | found.pop("versions"), **found)


def source_digest() -> str:
    """SHA-256 (the first characters) of this package's own files."""
    root = Path(llada_megatron.__file__).parent
    return _digest(sorted(root.rglob("*.py")))


def _digest(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _disk(path: Path) -> Disk:
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".llada-{uuid.uuid4().hex}"
        try:
            with probe.open("wb") as stream:
                stream.write(_PROBE)
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            probe.unlink(missing_ok=True)
        return Disk(str(path), shutil.disk_usage(path).free / 1e9, None)
    except OSError as error:
        return Disk(str(path), 0.0, error.strerror or str(error))
