"""What a node reports of itself in the preflight: its devices, memory, disks and versions."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

import llada_megatron
from llada_megatron.launch.cluster.preflight.device_process import DeviceProcess

_PROBE = b"llada" * 200


@dataclass(frozen=True)
class Disk:
    """A directory that the run writes to."""

    path: str
    free_gb: float
    error: str | None
    """Why a small file could not be written and removed there; None where it could."""


@dataclass(frozen=True)
class NodeReport:
    """What one node reports of itself."""

    node: str
    memory_gb: float
    """Free host memory in GB."""
    disks: list[Disk]
    versions: dict[str, str]
    gpus: list[dict[str, Any]] = field(default_factory=list)
    cpu: dict[str, Any] | None = None
    error: str | None = None
    """Why the devices could not be examined; None where they could."""
    time: float = 0.0
    """This node's clock when it sent the report (seconds since 1970)."""

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> NodeReport:
        """The report that `to_json` was called on."""
        values = json.loads(text)
        return cls(**values | {"disks": [Disk(**disk) for disk in values["disks"]]})


def make_report(
    node: str, output_dir: str, run_file: Path, device_process: DeviceProcess, deadline: float
) -> NodeReport:
    """Examine this node; its devices have until `deadline` (seconds of the monotonic clock) to answer."""
    device_process.start("look")  # it imports torch while this process does the rest
    disks = [_disk(Path(output_dir)), _disk(Path(tempfile.gettempdir()))]
    versions = {"run.yaml": _digest([run_file]), "source of llada-megatron": source_digest()}
    memory = psutil.virtual_memory().available / 1e9
    import torch  # noqa: F401  (for the store; its seconds pass while the devices are looked at)

    found = device_process.answer(max(1.0, deadline - time.monotonic()))
    if "error" in found:
        return NodeReport(node, memory, disks, versions, error=f"its devices could not be examined: {found['error']}")
    return NodeReport(node, memory, disks, versions | found.pop("versions"), **found)


def source_digest() -> str:
    """The first characters of the SHA-256 of this package's source files."""
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
