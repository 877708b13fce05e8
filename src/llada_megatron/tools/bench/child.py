"""A command as a user runs it, in a process of its own: what it printed, its time, and the memory it needed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

# On Linux the peak of a process begins with that of the process that started it: this one is small.
_STARTER = """
import json, resource, signal, subprocess, sys, time
signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C is for the command
begin = time.perf_counter()
status = subprocess.call(sys.argv[1:])
seconds = time.perf_counter() - begin
print("\\n" + json.dumps([status, seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]))
"""


@dataclass(frozen=True)
class Child:
    """One command, from its start to its end."""

    output: str
    """What it wrote to stdout."""
    status: int
    """Its exit status; negative: the signal that ended it."""
    seconds: float
    peak_gb: float
    """Largest resident memory of the process (1e9 bytes)."""


def run_child(command: Sequence[str]) -> Child:
    """Run a command and wait for it; its stderr goes where ours goes."""
    from llada_megatron.parallel.training.peak import RSS_UNIT

    starter = [sys.executable, "-I", "-S", "-c", _STARTER, *command]
    printed = subprocess.run(starter, stdout=subprocess.PIPE, text=True, check=True).stdout
    output, _, last = printed.rstrip("\n").rpartition("\n")
    status, seconds, resident = json.loads(last)
    return Child(output, status, seconds, resident * RSS_UNIT / 1e9)
