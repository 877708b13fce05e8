"""Where the time of a step goes: a profile, aggregated into the few kinds of work a reader can act on."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

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

    Time is each operator's own (its callees left out). What runs inside `Optimizer.step` counts as the optimizer; what
    no operator accounts for is Python, the autograd engine's bookkeeping and waiting.
    """
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
