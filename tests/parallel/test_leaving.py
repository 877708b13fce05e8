"""What a process has left of a training once it left its groups: nothing that would slow down the next one."""

from __future__ import annotations

import dataclasses
import os
import weakref

from llada_megatron.tools.bench.layouts import DENSE
from llada_megatron.tools.bench.measurement import single_process
from llada_megatron.tools.bench.our_step import OurStep, masked_batch, run_config, training_batch


def train() -> weakref.ref:
    """One step; what is still known of the model."""
    run = run_config(dataclasses.replace(DENSE, max_sequence_length=16, num_layers=1), 2, 16, 1e-3, 1.0)
    step = OurStep(run)
    step.step_on(training_batch(masked_batch(run.model, 2, 16, 0)))
    return weakref.ref(step.chunk)


def threads() -> int:
    return len(os.listdir("/proc/self/task"))


def test_neither_a_model_nor_the_threads_of_its_groups_stay():
    left = []
    for _ in range(2):
        with single_process():
            model = train()
        assert model() is None
        left.append(threads())
    assert left[1] <= left[0]
