"""Time, utilisation and memory of a training step by the number of documents in a window and the precision."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from llada_megatron.console import message
from llada_megatron.llada_moe.model.initialization import draw_in_place
from llada_megatron.llada_moe.model.parameters import count_parameters
from llada_megatron.parallel import device
from llada_megatron.parallel.training.out_of_memory import explained
from llada_megatron.parallel.training.peak import matmul_peak, peak_memory_gb
from llada_megatron.tools.bench.gpu import workloads
from llada_megatron.tools.bench.gpu.machine_figures import named_peak
from llada_megatron.tools.bench.gpu.part_run import PartRun, drop_graphs, release_memory
from llada_megatron.tools.bench.gpu.precisions import Precision, forget_scales, precisions
from llada_megatron.tools.bench.gpu.workloads import Workload
from llada_megatron.tools.bench.our_step import OurStep

DOCUMENTS, GOAL_DOCUMENTS = (1, 40, 8), (1, 40)
"""Per window; those that a goal is about come first, and parts whose goal another part has stop there."""
FP8_DOCUMENTS = (1,)
"""The goals of FP8 are about whole windows, and the whole command has eight minutes."""
_UNTIMED_STEPS, _TIMED_STEPS = 2, 3
"""The second step still allocates: with 40 documents the second of five took 5 % longer than the others."""


def dense(part: PartRun) -> None:
    """A dense model of 1.5 billion parameters."""
    _measure(part, lambda **training: workloads.dense(part.toy, **training), documents=GOAL_DOCUMENTS)


def llada_8b(part: PartRun) -> None:
    """Eight layers of LLaDA-8B."""
    _measure(part, lambda **training: workloads.llada_8b(part.toy, **training), recipes=True)


def moe_rank(part: PartRun) -> None:
    """What a rank of expert parallelism computes of LLaDA-MoE-7B-A1B."""
    _measure(part, lambda **training: workloads.moe_rank(part.toy, **training), recipes=True, documents=GOAL_DOCUMENTS)


def moe(part: PartRun) -> None:
    """LLaDA-MoE-7B-A1B, as many layers as fit."""
    _measure(part, lambda **training: workloads.moe(part.machine.memory, **training))


def mini(part: PartRun) -> None:
    """LLaDA2-mini, as many layers as fit."""
    _measure(part, lambda **training: workloads.mini(part.machine.memory, **training), documents=GOAL_DOCUMENTS)


def cell(precision: str, documents: int) -> str:
    """The name of a measurement."""
    return f"{precision}, {documents} document{'s' * (documents > 1)} a window"


def _measure(
    part: PartRun, make: Callable[..., Workload], recipes: bool = False, documents: Sequence[int] = DOCUMENTS
) -> None:
    """bf16, and the FP8 `recipes` if wanted; a model is built for a precision that has figures missing."""
    for precision in precisions(part.machine)[: None if recipes else 1]:
        counts = FP8_DOCUMENTS if precision.fp8 else documents
        names = {count: cell(precision.name, count) for count in counts}
        if not part.missing(names.values()):
            continue
        _measure_in(part, make, precision, names)
        forget_scales()
        release_memory()


def _measure_in(part: PartRun, make: Callable[..., Workload], precision: Precision, names: dict[int, str]) -> None:
    """One precision. A function of its own, so that nothing holds its model while that of the next one is built."""
    began = time.monotonic()
    try:
        work = make(**precision.training)
        with built(work) as step:
            message(f"{part.part.name}: {precision.name}: {_size(work)}, built in {time.monotonic() - began:.1f} s")
            for documents, name in names.items():
                part.measure(name, _figures, part, work, precision, step, documents)
    except Exception as failure:
        if isinstance(failure, part.ENDS):
            raise
        for name in part.missing(names.values()):
            part.failed(name, failure)


@contextmanager
def built(work: Workload) -> Iterator[OurStep]:
    """The model, optimizer and step of a workload, with weights drawn on the GPU."""
    with explained(work.run):
        step = OurStep(work.run, draw_in_place)
    try:
        yield step
    finally:
        drop_graphs(step.models)


def _size(work: Workload) -> str:
    model = work.run.model
    return f"{model.num_layers} layers, {count_parameters(model).total / 1e9:.2f} B parameters"


def _figures(part: PartRun, work: Workload, precision: Precision, step: OurStep, documents: int) -> dict[str, Any]:
    batch = work.batch(documents)
    with explained(work.run, step.models, step.optimizer):
        for _ in range(1 if part.toy else _UNTIMED_STEPS):
            step.step_on(batch)  # allocations, kernels that are compiled or chosen
        if device.cuda_available():
            torch.cuda.reset_peak_memory_stats()
        seconds = [_timed(lambda: step.step_on(batch)) for _ in range(1 if part.toy else _TIMED_STEPS)]
    middle, flops = statistics.median(seconds), work.flops(batch)
    ceiling = _ceiling(part, precision)
    named = named_peak(part.machine.device, precision.fp8)
    return {
        "tokens_per_second": work.tokens / middle,
        "step_seconds": middle,
        "flops_per_token": flops / work.tokens,
        "of_measured_ceiling": flops / middle / ceiling,
        **({"of_named_peak": flops / middle / named} if named else {}),
        "peak_memory_gb": peak_memory_gb(device.current()),
        "estimated_memory_gb": workloads.needed_bytes(work.run) / 1e9,
        "layers": work.run.model.num_layers,
        "parameters": count_parameters(work.run.model).total,
    }


def _ceiling(part: PartRun, precision: Precision) -> float:
    """FLOP/s of the part `ceilings` in the precision of most products; measured now where that has no figure."""
    known = part.results.read().figure("ceilings", "fp8" if precision.fp8 else "bf16", "flops_per_second")
    return known or matmul_peak(device.current(), torch.float8_e4m3fn if precision.fp8 else torch.bfloat16)


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()  # returns a number, so the device has finished
    return time.perf_counter() - began
