"""The constants of a GPU that no data sheet has, fitted on some of its published runs and tried on the others."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from llada_megatron.llada_moe.planning.gpu_sheet import GpuSheet
from llada_megatron.llada_moe.planning.step_time import step_time
from llada_megatron.tools.bench.planning.published_runs import PublishedRun

LIMITS = {
    "gemm_share": (0.3, 0.85),
    "gemm_fp8_share": (0.2, 0.8),
    "gemm_fp4_share": (0.15, 0.7),
    "attention_share": (0.2, 0.8),
    "grouped_half_rows": (20.0, 1500.0),
    "memory_share": (0.55, 0.92),
    "link_share": (0.3, 0.9),
    "dense_host_us": (100.0, 5000.0),
    "moe_host_us": (500.0, 20000.0),
}
"""What is fitted, and the values that are physically possible."""
FACTORS = (0.7, 0.85, 0.95, 0.99, 1.01, 1.05, 1.18, 1.4)
ROUNDS = 12
DEPARTURE = 0.12
"""Cost of leaving the values of the data sheet's file, so that a constant that no case depends on stays."""


HOPPER = {"moe_host_us": 9000.0}
BLACKWELL = HOPPER | {
    "gemm_share": 0.55,
    "gemm_fp8_share": 0.45,
    "gemm_fp4_share": 0.33,
    "attention_share": 0.4,
    "link_share": 0.6,
}
"""Where a fit starts: for the shares of B200 what SimuMax measured there (0.44 to 0.66 for products)."""


@dataclass(frozen=True)
class Split:
    """Which runs of a GPU the constants are fitted on, and which they are tried on."""

    fitted: list[PublishedRun]
    tried: list[PublishedRun]


def split(runs: Sequence[PublishedRun]) -> Split:
    """At most a third of the runs, whole configurations at a time, spread evenly over precisions and models.

    It depends on the names alone, never on what was measured.
    """
    groups: dict[str, list[PublishedRun]] = {}
    for run in sorted(runs, key=lambda run: (*_kind(run), run.workload.stack.hidden, run.name)):
        groups.setdefault(run.group, []).append(run)
    members = list(groups.values())
    kinds = {_kind(group[0]): group for group in reversed(members)}
    first = list(kinds.values())[::-1]
    order = [*first, *(group for start in range(3) for group in members[start::3])]
    fitted: list[PublishedRun] = []
    for group in order:
        if group[0] not in fitted and len(fitted) + len(group) <= len(runs) // 3:
            fitted += group
    names = {run.name for run in fitted}
    return Split(fitted, [run for run in runs if run.name not in names])


def _kind(run: PublishedRun) -> tuple[str, bool]:
    return run.workload.widths.compute, run.workload.stack.experts > 0


def fit(gpu: GpuSheet, runs: Sequence[PublishedRun]) -> GpuSheet:
    """`gpu` with the constants of `LIMITS` by which the runs' times are closest, in the mean of |log(ratio)|."""
    if not runs:
        return gpu
    start = best = started(gpu)
    cost = _cost(best, start, runs)
    for _ in range(ROUNDS):
        before = cost
        for name, (low, high) in LIMITS.items():
            for factor in FACTORS:
                value = min(high, max(low, getattr(best, name) * factor))
                candidate = replace(best, **{name: value})
                found = _cost(candidate, start, runs)
                if found < cost:
                    best, cost = candidate, found
        if before - cost < 1e-4:
            break
    return best


def started(gpu: GpuSheet) -> GpuSheet:
    """The data sheet of `gpu` with the constants that a fit starts from."""
    neutral = {field.name: field.default for field in fields(GpuSheet) if field.name in LIMITS}
    return replace(gpu, **neutral | (BLACKWELL if gpu.fp4_tflops else HOPPER))


def _cost(gpu: GpuSheet, start: GpuSheet, runs: Sequence[PublishedRun]) -> float:
    errors = [abs(math.log(step_time(run.workload, gpu).total / run.step_s)) for run in runs if run.step_s]
    moved = sum(abs(math.log(getattr(gpu, name) / getattr(start, name))) for name in LIMITS)
    return statistics.fmean(errors) + DEPARTURE * moved / len(LIMITS)
