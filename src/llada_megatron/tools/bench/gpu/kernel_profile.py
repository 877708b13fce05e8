"""Where the time of one training step goes on the GPU, by kind of kernel, and the fifteen longest kernels."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llada_megatron.console import message
from llada_megatron.parallel import device
from llada_megatron.parallel.training.out_of_memory import explained
from llada_megatron.tools.bench.gpu import workloads
from llada_megatron.tools.bench.gpu.part_run import PartRun
from llada_megatron.tools.bench.gpu.step_speed import built

DOCUMENTS, CELL, WAITS = 8, "step", "host waits of a step"
LONGEST = 15

KINDS = (
    (
        "memcpy",
        r"memcpy|memset|copy_kernel|Memcpy|Memset|CatArrayBatchedCopy|aten::copy_|aten::cat|aten::fill_|aten::zero_",
    ),
    ("comm", r"nccl|ncclDev|all_?reduce|reduce_?scatter|all_?gather|c10d::|gloo"),
    ("attention", r"flash|fmha|attention|softmax_warp|flex"),
    ("gemm", r"gemm|cublas|cutlass|nvjet|matmul|wgmma|aten::mm|aten::bmm|aten::addmm|_grouped_mm|grouped_experts"),
    (
        "permute and sort",
        r"permut|sort|scatter|gather|index|topk|radix|histc|masked_select|nonzero|cumsum|scan|embedding",
    ),
    ("norm", r"norm"),
    ("optimizer", r"adam|multi_tensor|l2norm"),
    (
        "elementwise",
        r"elementwise|vectorized|triton_|pointwise|reduce_kernel|activation|swiglu|silu|cast|transpose|aten::",
    ),
)
"""Kinds of kernels by a part of their names; the first that fits counts. What fits none is `other`."""


def profile(part: PartRun) -> None:
    """One step of the MoE model, after one that is not counted; on a GPU another one for where the host waits."""
    if not part.missing([CELL, *([WAITS] if device.cuda_available() else [])]):
        return
    work = workloads.moe(part.machine.memory)
    batch = work.batch(DOCUMENTS)
    with built(work) as step, explained(work.run, step.models, step.optimizer):
        step.step_on(batch)
        part.measure(CELL, _figures, part, partial(step.step_on, batch))
        if device.cuda_available():
            part.measure(WAITS, host_waits, partial(step.step_on, batch))


def _figures(part: PartRun, run: Callable[[], object]) -> dict[str, Any]:
    times = kernel_times(run)
    total = sum(times.values())
    path = part.results.beside("kernels.txt")
    longest = times.most_common(LONGEST)
    lines = [f"{100 * seconds / total:6.2f} %  {1000 * seconds:10.3f} ms  {name}" for name, seconds in longest]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    message(f"{part.part.name}: the {len(lines)} longest kernels are in {path}")
    return {"device_seconds": total, **{f"share of {kind}": share for kind, share in by_kind(times).items()}}


def host_waits(run: Callable[[], object]) -> dict[str, Any]:
    """How often the host waits for the GPU, as CUDA counts it, and where; the reading of the loss is one."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        f"{Path(each.filename).name}:{each.lineno}" for each in found if "synchronizing" in str(each.message)
    )
    return {"host_waits": places.total(), "places": ", ".join(f"{place} {n}" for place, n in places.most_common(20))}


def kernel_times(run: Callable[[], object]) -> Counter[str]:
    """Seconds of each kernel by its name; without a GPU, of each operator of torch, without those it calls."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.cuda_available():
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run()
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        if getattr(event, "is_user_annotation", False):
            continue  # a name for a stretch of time, not a kernel
        microseconds = event.self_device_time_total if device.cuda_available() else event.self_cpu_time_total
        if microseconds > 0:
            times[event.key] += microseconds / 1e6
    return times


def by_kind(times: Mapping[str, float]) -> dict[str, float]:
    """The share of each kind of kernel in the time of all; they add up to 1."""
    total, shares = sum(times.values()), dict.fromkeys([*(kind for kind, _ in KINDS), "other"], 0.0)
    for name, seconds in times.items():
        shares[kind_of(name)] += seconds / total
    return shares


def kind_of(name: str) -> str:
    """The kind of a kernel by its name."""
    return next((kind for kind, parts in KINDS if re.search(parts, name, re.IGNORECASE)), "other")
