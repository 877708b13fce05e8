"""The machine that is measured, as the program sees it that must not occupy the GPU itself."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.tools.environment import source_state

_PROBE = """
import json, torch
found = None
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    found = {"device": p.name, "memory": p.total_memory, "capability": 10 * p.major + p.minor}
print("\\n" + json.dumps(found))
"""
_SECONDS = 120


@dataclass(frozen=True)
class Machine:
    """What the figures are of."""

    device: str
    """The GPU's name, or the processor's architecture."""
    memory: int = field(compare=False)
    """Bytes of a GPU, which differ a little between cards of one kind; 0 without one."""
    capability: int
    """Compute capability times ten; 0 without a GPU."""
    torch: str
    transformer_engine: str | None = None
    """Version; None = not installed."""
    code: str | None = field(default=None, compare=False)
    """The commit of this project, with a + where files differ from it; None = not known."""

    @property
    def toy(self) -> bool:
        """Whether there is no GPU: every part then runs at a size that says nothing but that it runs."""
        return self.capability == 0

    def describe(self) -> str:
        """In a message."""
        engine = f", Transformer Engine {self.transformer_engine}" if self.transformer_engine else ""
        return f"{self.device} with torch {self.torch}{engine}"


def find_machine() -> Machine:
    """The machine, found by a process of its own: CUDA keeps memory for each process that uses it.

    Raises:
        ResourceError: torch cannot say what there is.
    """
    done = subprocess.run([sys.executable, "-P", "-c", _PROBE], capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ResourceError(f"torch cannot tell what this machine has: {last}; see `llada env`")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if found is None:
        found = {"device": f"a CPU ({platform.machine()})", "memory": 0, "capability": 0}
    return Machine(**found, torch=version("torch"), transformer_engine=_engine(), code=_code())


def _engine() -> str | None:
    try:
        return version("transformer-engine")
    except PackageNotFoundError:
        return None


def _code() -> str | None:
    source = source_state(Path(__file__).parent)
    return f"{source['commit'][:12]}{'+' * source['local changes']}" if source["commit"] else None
