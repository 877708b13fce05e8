"""Limits of the memory and the processor time of this process, set for code that is not ours."""

from __future__ import annotations

import contextlib
import math
import os
import resource
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """What one call of code that is not ours may take: far more than any honest file needs."""

    cpu_s: int = 10
    """Processor time, which does not run on while other programs have the processor."""
    wall_s: float = 300.0
    """Time on the clock, for what waits instead of computing."""
    memory_bytes: int = 4 * 2**30
    """Memory that the process may take in addition to what it has before the first call."""
    answer_bytes: int = 2**26
    """Size of the answer as JSON."""


def limit_memory(more_bytes: int) -> None:
    """Let this process take at most so many bytes more than now (Linux; elsewhere as far as the system heeds it)."""
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = _data_bytes() + more_bytes
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def allow_cpu(seconds: float) -> None:
    """End this process (SIGXCPU) once it has used the processor for so many seconds more than now."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    wanted = math.ceil(used.ru_utime + used.ru_stime + seconds)
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (wanted, hard))


def _data_bytes() -> int:
    """Bytes of writable private memory of this process, which is what RLIMIT_DATA counts."""
    try:
        pages = int(Path("/proc/self/statm").read_text("ascii").split()[5])
    except (OSError, ValueError, IndexError):
        return 2**28
    return pages * os.sysconf("SC_PAGE_SIZE")
