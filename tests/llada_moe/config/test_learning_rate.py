"""The learning rate is a pure function of the step with the promised corners."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, LearningRateDropConfig, learning_rate

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
