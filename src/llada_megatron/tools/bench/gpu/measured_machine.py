"""The machine that is measured, as the program sees it that must not occupy the GPU itself."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import dataclass, field

from llada_megatron.llada_moe.errors import ResourceError

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

    @property
    def toy(self) -> bool:
        """Whether there is no GPU: every part then runs at a size that says nothing but that it runs."""
        return self.capability == 0

    def describe(self) -> str:
        """In a message."""
        return f"{self.device} with torch {self.torch}"


def find_machine() -> Machine:
    """The machine, found by a process of its own: CUDA keeps memory for each process that uses it.

    Raises:
        ResourceError: torch cannot say what there is.
    """
    from importlib.metadata import version

    done = subprocess.run([sys.executable, "-P", "-c", _PROBE], capture_output=True, text=True, timeout=_SECONDS)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ResourceError(f"torch cannot tell what this machine has: {last}; see `llada env`")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if found is None:
        found = {"device": f"a CPU ({platform.machine()})", "memory": 0, "capability": 0}
    return Machine(**found, torch=version("torch"))
