"""What a command or a piece of work in this process takes: its time, its memory, and what the time goes to.

Nothing here imports torch or Megatron before it is called.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
class CommandResult:
    """What a command printed, and what it took."""

    output: str
    """What it wrote to stdout."""
    status: int
    """Its exit status; negative: the signal that ended it."""
    seconds: float
    peak_gb: float
    """Largest resident memory of the process (1e9 bytes)."""


def run_command(command: Sequence[str]) -> CommandResult:
    """Run a command as a user does, in a process of its own, and wait for it; its stderr goes where ours goes."""
    from llada_megatron.parallel.training.peak import RSS_UNIT

    starter = [sys.executable, "-I", "-S", "-c", _STARTER, *command]
    printed = subprocess.run(starter, stdout=subprocess.PIPE, text=True, check=True).stdout
    output, _, last = printed.rstrip("\n").rpartition("\n")
    status, seconds, resident = json.loads(last)
    return CommandResult(output, status, seconds, resident * RSS_UNIT / 1e9)


@contextlib.contextmanager
def single_process(seed: int = 0) -> Iterator[None]:
    """A Megatron world of this process alone, on this machine's device, for as long as the block lasts."""
    from llada_megatron.parallel import device

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on stderr
    device.install()
    from llada_megatron.parallel import topology

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and Megatron announce coming changes of their own insides
        with topology.world_of_one(seed):
            yield


def largest(values: Iterable[float]) -> float:
    """The largest; not a number where one of them is none, which `max` passes over unless it comes first."""
    kept = list(values)
    return math.nan if any(math.isnan(value) for value in kept) else max(kept)


def peak_bytes(work: Callable[[], object]) -> int:
    """Largest sum of live bytes that `work` adds, results it returns included, from the allocator's own events.

    CPU: memory events of torch's profiler, each the size of one allocation or release. CUDA: the caching allocator.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    del result
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def written_bytes(work: Callable[[], object]) -> int:
    """Bytes that the operators of `work` write: the sizes of what each of them returns, views apart."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            returned = operator(*args, **(kwargs or {}))
            if not operator.is_view:
                tensors = returned if isinstance(returned, (tuple, list)) else (returned,)
                self.total += sum(getattr(tensor, "nbytes", 0) for tensor in tensors)
            return returned

    with Count() as count:
        work()
    return count.total


PYTHON = "Python and idle"

OPTIMIZER = "optimizer"

_KINDS = (
    (
        "attention",
        ("scaled_dot_product", "_flash_attention", "_efficient_attention", "_softmax_backward_data_attention"),
    ),
    (
        "matrix products",
        ("aten::mm", "aten::bmm", "aten::addmm", "aten::_grouped_mm", "aten::baddbmm", "grouped_experts"),
    ),
    ("cross-entropy", ("log_softmax", "nll_loss", "VocabParallelCrossEntropy")),
    ("collectives", ("c10d::", "gloo:", "nccl:", "record_param_comms")),
    (
        "routing, permutation, gathers",
        (
            "index",
            "gather",
            "scatter",
            "topk",
            "sort",
            "masked_select",
            "nonzero",
            "cumsum",
            "histc",
            "embedding",
            "one_hot",
        ),
    ),
    ("norms and elementwise", ("aten::",)),
)
"""Kinds of work by a part of the operator's name; the first that fits wins."""

KINDS = (*(name for name, _ in _KINDS), OPTIMIZER, PYTHON)


def breakdown(step: Callable[[], object]) -> dict[str, float]:
    """Share of one step's time by kind of work, adding up to 1. The profiler itself slows Python a little.

    Time is each operator's own, without its callees. What runs inside `Optimizer.step` counts as the optimizer; what
    no operator accounts for is Python, the autograd engine's bookkeeping and waiting.
    """
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        step()
        microseconds = (time.perf_counter() - start) * 1e6
    shares: dict[str, float] = defaultdict(float)
    for event in profiler.events():
        kind = _kind(event)
        if kind is not None:
            shares[kind] += event.self_cpu_time_total / microseconds
    shares[PYTHON] = max(0.0, 1.0 - sum(shares.values()))
    return {name: shares[name] for name in KINDS}


def _kind(event: Any) -> str | None:
    if _inside_optimizer(event):
        return OPTIMIZER
    return next((name for name, parts in _KINDS if any(part in event.name for part in parts)), None)


def _inside_optimizer(event: Any) -> bool:
    while event is not None:
        if event.name.startswith("Optimizer."):
            return True
        event = event.cpu_parent
    return False


def format_breakdown(columns: dict[str, dict[str, float]]) -> str:
    """Several breakdowns side by side, in percent of each step."""
    width = max(map(len, KINDS))
    lines = [" " * width + "".join(f"{name:>16}" for name in columns)]
    lines += [f"{kind:<{width}}" + "".join(f"{100 * c[kind]:>15.1f}%" for c in columns.values()) for kind in KINDS]
    return "\n".join(lines)
