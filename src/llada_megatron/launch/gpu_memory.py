"""Whether a run fits on its GPUs, estimated before anything starts (see `llada plan`)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.llada_moe.planning.estimate import GIB, Assumptions, Estimate
from llada_megatron.llada_moe.planning.gpu_sheet import GpuSheet, load_gpu
from llada_megatron.llada_moe.planning.layout_search import more_gpus, smallest_change

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.run import RunConfig

KNOWN = "h100"
"""Whose speed stands in for that of a GPU that only its memory is known of; what fits does not depend on it."""

SURE = 1.1
"""Estimated tensors over the card's memory above which a run is refused: estimates were up to 7 % above what was
measured (docs/plan.md), and a run that would have fitted must not be refused."""


def sheet_of_memory(name: str, total_bytes: int) -> GpuSheet:
    """A GPU that is here, of which torch says the name and the memory."""
    return replace(load_gpu(KNOWN), name=name, memory_gib=total_bytes / GIB)


def check_gpu_memory(run: RunConfig, gpu: GpuSheet) -> str | None:
    """Refuse a run whose tensors alone are surely larger than the memory of a GPU; a warning where they may be, or
    leave too little, and of a run in FP8, whose memory was never held against a measurement. Experts are taken to be
    loaded evenly.

    Raises:
        ResourceError: with the estimate and the smallest change that fits.
    """
    estimate = Estimate(run, gpu, Assumptions(imbalance=1.0))
    if estimate.fits:
        return None
    needed = estimate.worst.allocated / GIB
    change = smallest_change(estimate)
    advice = f"it would fit with {change}" if change else f"no change of it fits; {more_gpus(estimate)}"
    found = (
        f"the ranks of pipeline stage {estimate.worst.stage} need about {needed:.1f} GiB of tensors each, and "
        f"{estimate.card_bytes / GIB:.1f} GiB with what the allocator, CUDA and NCCL keep; {gpu.name} has "
        f"{gpu.memory_gib:.1f} GiB; {advice}"
    )
    if run.training.fp8 is not None:
        return f"{found} (an estimate that was never held against a run in FP8)"
    if needed > SURE * gpu.memory_gib:
        raise ResourceError(found)
    return found
