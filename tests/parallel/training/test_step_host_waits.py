"""Where the host waits for the device in a training step: nowhere by our own choice but for the one verdict."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.parallel.training.recovery.policy import History
from llada_megatron.tools.bench.layouts import DENSE, SIGMOID, parity_run
from tests.host_waits import HostWaits, Wait
from tests.ranks import run_ranks


def step_waits(model, layout, microbatches, recompute="none"):
    """What one rank waits for in a step that is judged, clipped and applied."""
    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.expert_load import ExpertLoad
    from llada_megatron.parallel.training import distributed_optimizer
    from llada_megatron.parallel.training.recovery.attempt import RouterStateSnapshot, StepRunner
    from llada_megatron.parallel.training.step import TrainingStep
    from llada_megatron.tools.bench.parity import SyntheticData

    size = layout.data_parallel * microbatches
    run = parity_run(model, layout, global_batch_size=size, micro_batch_size=1, recompute=recompute)
    topology.initialize(run.layout, run.training.seed)
    models = build.wrap(run, build.build_run_chunks(run))
    step = TrainingStep(run, models, distributed_optimizer.build_optimizer(run, models), SyntheticData(run))
    load = ExpertLoad(models)
    runner = StepRunner(run, step, SimpleNamespace(history=History()), RouterStateSnapshot(models, load.counters))
    step.update(runner(0, lambda: False).norm)
    waits = HostWaits(models)
    waits.mark(*load.counters())
    with waits:
        step.update(runner(1, lambda: False).norm)
    return waits.waits, waits.lines, str(waits)
