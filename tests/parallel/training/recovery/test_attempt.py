"""The verdict on a step is the same on every rank, also where a rank has no loss of its own, or the same as another."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.parallel.training.recovery.policy import History
from llada_megatron.tools.bench.layouts import SIGMOID, parity_run
from tests.ranks import run_ranks

LAYOUTS = {
    "PP2": LayoutConfig(pipeline_parallel=2),
    "TP2": LayoutConfig(tensor_parallel=2, sequence_parallel=True),
    "CP2": LayoutConfig(context_parallel=2),
}


def _attempt(layout):
    """A step that the last rank wants to be the last, the next one with a NaN in the last rank's loss, and again."""
    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.expert_load import ExpertLoad
    from llada_megatron.parallel.training import distributed_optimizer
    from llada_megatron.parallel.training.recovery.attempt import RouterStateSnapshot, StepRunner
    from llada_megatron.parallel.training.step import TrainingStep
    from llada_megatron.tools.bench.parity import SyntheticData

    run = parity_run(SIGMOID, layout, global_batch_size=4, precision="fp32")
    topology.initialize(run.layout, run.training.seed)
    models = build.wrap(run, build.build_run_chunks(run))
    step = TrainingStep(run, models, distributed_optimizer.build_optimizer(run, models), SyntheticData(run))
    undo = RouterStateSnapshot(models, ExpertLoad(models).counters)
    attempts = StepRunner(run, step, SimpleNamespace(history=History()), undo)
    last, gradients = dist.get_rank() == dist.get_world_size() - 1, step.gradients

    def spoilt(number):
        losses = gradients(number)
        if last:
            losses.loss.fill_(math.nan)
        return losses

    good = attempts(0, lambda: last)
    step.update(good.norm)
    step.gradients = spoilt
    bad = attempts(1, lambda: False)
    step.gradients = gradients
    again = attempts(1, lambda: False)
    assert bad.fault is not None and math.isnan(bad.loss) and not bad.stop
    assert good.stop and good.fault is again.fault is again.passed is None
    return good.loss, good.grad_norm, again.loss, again.grad_norm


@functools.cache
def one_process():
    return run_ranks(_attempt, 1, LayoutConfig())[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_ranks_have_the_loss_and_the_verdict_of_one_process(layout):
    first, second = run_ranks(_attempt, 2, LAYOUTS[layout])
    assert first == second
    assert first == pytest.approx(one_process(), rel=1e-5)


def _norm_of_one_rank(layout):
    """What the ranks agree on where one has an infinite gradient norm."""
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.training.recovery.attempt import StepRunner

    topology.initialize(layout, seed=1)
    losses = SimpleNamespace(loss=torch.tensor(1.0), clean_loss=torch.tensor(0.25))
    runner = StepRunner(parity_run(SIGMOID, layout), None, None, None)
    return [
        runner._agreed(losses, math.inf if dist.get_rank() == 1 else 2.0, False),
        runner._agreed(losses, 2.0, False),
    ]


def test_a_norm_that_is_not_finite_on_one_rank_is_so_on_all():
    for spoilt, good in run_ranks(_norm_of_one_rank, 2, LayoutConfig(data_parallel=2)):
        assert math.isnan(spoilt[2]) and spoilt[:2] == (2.0, 0.5) and not spoilt[3]
        assert good == (2.0, 0.5, 2.0, False)
