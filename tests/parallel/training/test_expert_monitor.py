"""The experts of a run: the same counts under every layout and recomputation, by the mask ratio of their sequences."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.tools.bench.layouts import SIGMOID, parity_run
from tests.ranks import run_ranks

STEPS, SEQUENCES, LENGTH = 2, 8, 32
MOE_LAYERS = [2, 3, 4]


def read(layout, recompute):
    """The reading after two steps (without an update between them), and the mask ratios of their sequences."""
    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.training.distributed_optimizer import build_optimizer
    from llada_megatron.parallel.training.experts.expert_monitor import ExpertMonitor
    from llada_megatron.parallel.training.step import TrainingStep
    from llada_megatron.tools.bench.parity import SyntheticData

    run = parity_run(SIGMOID, layout, recompute=recompute, global_batch_size=SEQUENCES, micro_batch_size=2)
    topology.initialize(run.layout, run.training.seed)
    models = build.wrap(run, build.build_run_chunks(run))
    data = SyntheticData(run)
    step = TrainingStep(run, models, build_optimizer(run, models), data)
    monitor = ExpertMonitor(run, models)
    for number in range(STEPS):
        step.gradients(number)
    reading = monitor.read(STEPS)
    again = monitor.read(1)
    assert not any(map(sum, again.totals.values())) and again.routers == {}
    ratios = data.batch(range(STEPS * SEQUENCES)).mask_ratio.tolist()
    return reading, ratios


@functools.cache
def one_process():
    return run_ranks(read, 1, LayoutConfig(), "none")[0]


def test_tokens_are_counted_by_the_mask_ratio_of_their_sequence():
    reading, ratios = one_process()
    assert sorted(reading.counts) == MOE_LAYERS
    expected = np.bincount([math.ceil(np.float32(ratio) * 10) - 1 for ratio in ratios], minlength=10)
    for bins in reading.counts.values():
        assert (np.sum(bins, axis=1) == expected * LENGTH * SIGMOID.moe.top_k).all()
    assert reading.waiting is None
    scalars = reading.scalars(1.0)
    names = {f"expert_load/by_mask_ratio/{bin / 10:.2g}-{(bin + 1) / 10:.2g}" for bin in expected.nonzero()[0]}
    assert {name for name in scalars if "by_mask_ratio" in name} == names
    assert scalars["router/z"] > 0
    assert 0 < scalars["router/bias_drift"] <= 1.01 * STEPS * SIGMOID.moe.expert_bias_update_rate


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        (LayoutConfig(data_parallel=2, expert_parallel=2), "full"),
        (LayoutConfig(pipeline_parallel=2), "none"),
    ],
    ids=["EP2 recomputed", "PP2"],
)
def test_counts_do_not_depend_on_the_layout(layout, recompute):
    alone, _ = one_process()
    reading, _ = run_ranks(read, layout.world_size, layout, recompute)[0]
    assert reading.counts == alone.counts
    waiting = reading.waiting
    if layout.expert_parallel == 1:
        assert waiting is None
        return
    load = np.array([reading.line()["tokens_per_rank"][str(layer)] for layer in MOE_LAYERS])
    assert load.sum() == sum(map(sum, reading.totals.values()))
    at_least = load.max(axis=1).sum() / load.mean(axis=1).sum()  # a pass is never more even than the sum of passes
    assert waiting.max_over_mean >= at_least > 1
    assert waiting.waiting_share == pytest.approx(1 - 1 / waiting.max_over_mean)
    assert waiting.seconds_lost_per_step > 0


def test_the_image_is_white_without_tokens_and_red_at_twice_the_mean():
    from llada_megatron.parallel.training.experts.expert_reading import IMAGE_CELL, ExpertReading

    image = ExpertReading(1, {2: [[0, 2, 4]], 3: [[5, 5, 5]]}, {}, 1, None).image()
    assert image.shape == (2 * IMAGE_CELL, 3 * IMAGE_CELL, 3)
    assert image[0, 0].tolist() == [255, 255, 255]
    assert image[0, -1].tolist() == [190, 40, 30]
    assert image[-1, 0].tolist() == image[0, IMAGE_CELL].tolist() == [122, 160, 205]
