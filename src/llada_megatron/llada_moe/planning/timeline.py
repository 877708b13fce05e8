"""When each stage of a pipeline runs which micro-batch: Megatron's schedule of one forward, one backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FORWARD = 1 / 3
"""Share of a micro-batch's time that is its forward pass."""


@dataclass(frozen=True)
class Slot:
    """One pass of one micro-batch on one stage, in seconds from the start of the step."""

    stage: int
    micro_batch: int
    forward: bool
    start: float
    end: float


def order(stage: int, stages: int, micro_batches: int) -> list[tuple[bool, int]]:
    """What a stage runs, one after another: (forward, micro-batch)."""
    warm = min(stages - stage - 1, micro_batches)
    passes = [(True, number) for number in range(warm)]
    for number in range(micro_batches - warm):
        passes += [(True, warm + number), (False, number)]
    return passes + [(False, number) for number in range(micro_batches - warm, micro_batches)]


def one_forward_one_backward(seconds: Sequence[float], micro_batches: int) -> list[Slot]:
    """Every pass of a step. `seconds`: of one micro-batch on each stage, both passes together."""
    stages = len(seconds)
    waiting = [order(stage, stages, micro_batches) for stage in range(stages)]
    free = [0.0] * stages
    done: dict[tuple[int, bool, int], float] = {}
    slots: list[Slot] = []
    while any(waiting):
        for stage in range(stages):
            while waiting[stage]:
                forward, number = waiting[stage][0]
                ready = _ready(done, stage, forward, number, stages)
                if ready is None:
                    break
                start = max(free[stage], ready)
                end = start + seconds[stage] * (FORWARD if forward else 1 - FORWARD)
                free[stage] = done[stage, forward, number] = end
                slots.append(Slot(stage, number, forward, start, end))
                waiting[stage].pop(0)
    return slots


def _ready(
    done: dict[tuple[int, bool, int], float], stage: int, forward: bool, number: int, stages: int
) -> float | None:
    """When what a pass needs is there; None = it has not been run yet."""
    if forward:
        return 0.0 if stage == 0 else done.get((stage - 1, True, number))
    return done.get((stage, True, number)) if stage == stages - 1 else done.get((stage + 1, False, number))
