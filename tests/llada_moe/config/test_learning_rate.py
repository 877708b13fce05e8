"""The learning rate is a pure function of the step with the promised corners."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.config.optimizer import (
    LearningRateConfig,
    LearningRateDropConfig,
    check_learning_rate,
    fits,
    learning_rate,
    scaled,
)
from llada_megatron.llada_moe.errors import ConfigError

SHAPES = ("linear", "cosine", "inverse_sqrt")


def test_every_step_of_a_small_schedule():
    config = LearningRateConfig(
        peak=8.0, warmup_steps=4, drops=[LearningRateDropConfig(step=6, value=4.0)], decay_steps=4, final=0.0
    )
    rates = [learning_rate(config, step, 12) for step in range(14)]
    assert rates == [2, 4, 6, 8, 8, 8, 4, 4, 3, 2, 1, 0, 0, 0]


def test_without_warmup_or_decay_the_rate_is_constant():
    config = LearningRateConfig(peak=1.0)
    assert {learning_rate(config, step, 5) for step in range(10)} == {1.0}


@pytest.mark.parametrize("shape", SHAPES)
def test_decay_ends_at_the_last_step(shape):
    config = LearningRateConfig(peak=1e-3, decay_steps=10, decay_shape=shape, final=1e-5)
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates[9] == 1e-3 > rates[10]
    assert rates[-1] == pytest.approx(1e-5)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_a_decay_that_fills_the_run_starts_from_the_peak():
    config = LearningRateConfig(peak=1.0, decay_steps=4)
    assert [learning_rate(config, step, 4) for step in range(4)] == [0.75, 0.5, 0.25, 0.0]


@settings(derandomize=True, deadline=None)
@given(
    warmup=st.integers(0, 20),
    constant=st.integers(0, 20),
    decay=st.integers(0, 20),
    shape=st.sampled_from(SHAPES),
    final=st.floats(1e-6, 1e-3),
)
def test_the_rate_rises_then_never_rises_again_and_stays_in_bounds(warmup, constant, decay, shape, final):
    steps = warmup + constant + decay
    config = LearningRateConfig(peak=1e-3, warmup_steps=warmup, decay_steps=decay, decay_shape=shape, final=final)
    rates = [learning_rate(config, step, steps) for step in range(steps)]
    assert all(0 < rate <= 1e-3 * (1 + 1e-12) for rate in rates)
    assert rates[:warmup] == sorted(rates[:warmup])
    tail = rates[max(warmup - 1, 0) :]
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(tail))


def test_fewer_steps_scale_the_schedule_of_the_file_and_say_so():
    said = []
    rate = load_run("llada-8b-pretrain", ["training.steps=1000"], said.append).optimizer.learning_rate
    assert (rate.warmup_steps, [drop.step for drop in rate.drops], rate.decay_steps) == (4, [521], 130)
    assert (rate.peak, rate.final, rate.drops[0].value) == (4e-4, 1e-5, 1e-4)
    assert said == [
        "training.steps=1000: the learning rate's schedule is scaled from 438690 steps: warmup_steps 2000 to 4, "
        "decay_steps 57220 to 130, the drop at 228882 to 521"
    ]


@pytest.mark.parametrize(
    "overrides",
    [[], ["training.steps=1460"], ["training.steps=4000"], ["training.steps=50", "optimizer.learning_rate={peak: 1}"]],
)
def test_a_schedule_that_fits_or_is_given_as_well_stays(overrides):
    said = []
    rate = load_run("demo", overrides, said.append).optimizer.learning_rate
    assert said == [] and (rate.warmup_steps, rate.decay_steps) in ((60, 1400), (0, 0))


def test_a_schedule_that_is_given_as_well_and_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="warmup_steps 60 .* decay_steps 1400 .* more than training.steps 50"):
        load_run("demo", ["training.steps=50", "optimizer.learning_rate.decay_steps=1400"])


@given(steps=st.integers(1, 99), warmup=st.integers(0, 100), decay=st.integers(0, 100), drop=st.integers(0, 100))
def test_what_fits_still_fits_when_it_is_scaled(steps, warmup, decay, drop):
    drops = [LearningRateDropConfig(step=drop, value=0.5)] if warmup <= drop < 100 - decay else []
    final = 0.1 if decay else 0.0
    before = LearningRateConfig(peak=1.0, warmup_steps=warmup, drops=drops, decay_steps=decay, final=final)
    if not fits(before, 100):
        return
    refused = []
    check_learning_rate(before, 100, lambda key, why: refused.append(key))
    after = scaled(before, 100, steps)
    check_learning_rate(after, steps, lambda key, why: refused.append(key))
    assert [key for key in refused if not key.startswith("drops")] == []
    assert abs(after.warmup_steps - warmup * steps / 100) < 1
    assert after.decay_steps > 0 or decay == 0


def test_a_decay_that_is_scaled_keeps_a_step_to_reach_its_end():
    before = LearningRateConfig(peak=1.0, decay_steps=10, final=0.1)
    assert scaled(before, 1000, 50).decay_steps == 1
    assert scaled(LearningRateConfig(peak=1.0), 1000, 50).decay_steps == 0


def test_a_drop_where_the_decay_begins_does_not_fit():
    drop = LearningRateDropConfig(step=80, value=0.5)
    assert not fits(LearningRateConfig(peak=1.0, decay_steps=20, drops=[drop]), 100)
    assert fits(LearningRateConfig(peak=1.0, decay_steps=20, drops=[drop]), 101)
