"""The policy as a function of what happened: what counts as bad, what is done, and how often."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.llada_moe.config import from_dict, to_dict
from llada_megatron.llada_moe.config.recovery import RecoveryConfig
from llada_megatron.parallel.training.recovery import policy
from llada_megatron.parallel.training.recovery.policy import History, StepFault

SPIKES = RecoveryConfig(spike="skip", spike_window=16, spike_threshold=6.0)

FINITE = st.floats(-1e6, 1e6)

NOT_FINITE = st.sampled_from([math.nan, math.inf, -math.inf])


def history(losses=(), **keys):
    return History(losses=list(losses), **keys)


def noise(count, seed=0):
    draw = random.Random(seed)
    return [3.0 + draw.gauss(0, 0.1) for _ in range(count)]


def fault(step=5, reason="not_finite"):
    return StepFault(step=step, reason=reason, loss=math.nan, grad_norm=1.0)


@given(NOT_FINITE, FINITE, st.booleans(), st.integers(0, 40))
def test_what_is_not_finite_is_bad_whatever_came_before(bad, good, in_loss, seen):
    loss, norm = (bad, good) if in_loss else (good, bad)
    found = policy.find_fault(RecoveryConfig(), history(noise(seen)), 3, loss, norm)
    assert found is not None and (found.reason, found.step) == ("not_finite", 3)


@given(st.floats(0, 1e4), st.integers(0, 100))
def test_a_loss_that_falls_or_is_within_the_noise_is_no_spike(drop, seen):
    assert policy.find_fault(SPIKES, history(noise(seen)), 9, 3.0 - drop, 1.0) is None
    assert policy.find_fault(SPIKES, history(noise(seen)), 9, 3.2, 1.0) is None


@given(st.integers(0, 40))
def test_a_jump_is_a_spike_once_half_the_window_is_there(seen):
    found = policy.find_fault(SPIKES, history(noise(seen)), 9, 5.0, 1.0)
    assert (found is not None) == (seen >= 8)
    assert policy.find_fault(RecoveryConfig(spike_window=16), history(noise(seen)), 9, 5.0, 1.0) is None  # ignored


def test_half_of_the_default_window_must_be_there():
    config = RecoveryConfig(spike="skip")
    assert config.spike_window == 128
    assert policy.find_fault(config, history(noise(63)), 64, 50.0, 1.0) is None
    assert policy.find_fault(config, history(noise(64)), 65, 50.0, 1.0).reason == "spike"


def test_a_loss_at_the_threshold_itself_is_no_spike():
    seen = history([1.0, 3.0] * 8)  # mean 2, deviation 1
    assert policy.find_fault(SPIKES, seen, 17, 8.0, 1.0) is None
    assert policy.find_fault(SPIKES, seen, 17, math.nextafter(8.0, 9.0), 1.0).deviations > 6


def test_deviations_are_those_of_the_window_only():
    old = [100.0, -100.0] * 50  # before the window; would hide any spike
    assert policy.deviations(SPIKES, old + [1.0, 3.0] * 8, 5.0) == pytest.approx(3.0)  # mean 2, deviation 1
    assert policy.deviations(SPIKES, [2.0] * 16, 5.0) is None  # no scale to judge by


@given(st.lists(FINITE, max_size=60), st.integers(8, 20))
def test_the_history_keeps_the_newest_losses_and_survives_the_manifest(losses, window):
    kept = history()
    for loss in losses:
        kept.accept(loss, window)
    kept.add(policy.rolled_back(RecoveryConfig(learning_rate_factor=0.25), fault(), 3))
    assert kept.losses == losses[-window:]
    assert from_dict(History, to_dict(kept)) == kept


@pytest.mark.parametrize(("not_finite", "spike"), [("skip", "rollback"), ("rollback", "skip"), ("stop", "rollback")])
def test_each_fault_has_its_remedy_until_the_decisions_are_used_up(not_finite, spike):
    config = RecoveryConfig(not_finite=not_finite, spike=spike, max_decisions=2)
    past = history()
    for _ in range(2):
        assert policy.remedy(config, past, fault()) == not_finite
        assert policy.remedy(config, past, fault(reason="spike")) == spike
        past.add(policy.retried(fault()))  # does not count
        past.add(policy.skipped(fault()))
    assert {policy.remedy(config, past, fault(reason=reason)) for reason in ("not_finite", "spike")} == {"stop"}


@given(st.integers(0, 30), st.integers(1, 20), st.integers(0, 12))
def test_going_back_leaves_out_the_bad_step_and_those_before_it_after_the_checkpoint(back_to, distance, skip_steps):
    bad = back_to + distance
    decision = policy.rolled_back(RecoveryConfig(skip_steps=skip_steps), fault(bad), back_to)
    assert decision.left_out == [s for s in range(bad + 1) if s > back_to and s > bad - skip_steps]


def test_rates_fall_from_the_step_gone_back_to_and_multiply():
    config = RecoveryConfig(learning_rate_factor=0.5)
    past = history()
    past.add(policy.rolled_back(config, fault(9), 6))
    past.add(policy.skipped(fault(11)))
    past.add(policy.rolled_back(config, fault(17), 12))
    assert [past.rate_factor(step) for step in (6, 7, 12, 13, 99)] == [1.0, 0.5, 0.5, 0.25, 0.25]
    assert [past.in_force(step) for step in (6, 7, 10, 11, 12, 13)] == [0, 1, 1, 2, 2, 3]
    assert [step for step in range(1, 20) if past.skips(step)] == [9, 11, 17]


def test_the_same_decision_twice_counts_twice_and_what_is_read_twice_counts_once():
    past = history()
    same = policy.rolled_back(RecoveryConfig(skip_steps=0, learning_rate_factor=0.5), fault(9), 6)
    past.add(same)
    saved = from_dict(History, to_dict(past))
    past.add(same)
    assert past.counted == 2
    saved.learn(past.decisions)
    saved.learn(past.decisions)
    assert saved == past


def test_passing_faults_are_bounded():
    config, past = RecoveryConfig(max_decisions=2), history()
    while not policy.broken_machine(config, past):
        past.add(policy.retried(fault()))
    assert past.retries == 20 and past.counted == 0
