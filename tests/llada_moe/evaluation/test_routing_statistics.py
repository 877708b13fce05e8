"""What a routing trace tells, against counts by hand and against traces made to show it."""

import dataclasses

import numpy as np
import pytest

from llada_megatron.llada_moe.evaluation.routing_statistics import (
    block_sets,
    closest_pairs,
    coactivation,
    routing_changes,
)
from llada_megatron.llada_moe.evaluation.routing_trace import RoutingTrace, distance, distance_by_chance


def make_trace(choices, experts=4, block_size=2, **changed):
    """One layer, rows in blocks of two, all visible, at one ratio."""
    choices = np.array([choices], np.int16)
    rows = choices.shape[1]
    numbers = np.arange(rows)
    trace = RoutingTrace(
        layers=[2], experts=experts, choices=choices, ratios=[0.5], ratio=np.zeros(rows, np.int16),
        masked=np.zeros(rows, bool), tokens=numbers.astype(np.int64), position=(numbers % block_size).astype(np.int32),
        block=numbers // block_size, block_size=block_size, window=np.zeros(rows, np.int32), sources=["a"],
        source=np.zeros(rows, np.int16),
    )  # fmt: skip
    return dataclasses.replace(trace, **changed)


CHOICES = [[0, 1], [0, 1], [0, 2], [1, 3]]


def test_load_by_a_label_leaves_negative_ones_out():
    trace = make_trace(CHOICES)
    assert trace.load()[0, 0].tolist() == [3, 3, 1, 1]
    assert trace.load(np.array([0, 1, 1, -1]), 2)[0].tolist() == [[1, 1, 0, 0], [2, 1, 1, 0]]


def test_distance_is_the_share_of_choices_that_moved():
    assert distance(np.array([2, 2]), np.array([4, 0])) == 0.5
    assert distance(np.array([1, 3]), np.array([2, 6])) == 0.0
    assert distance(np.array([0, 0]), np.array([1, 0])) == 0.0


def test_distance_by_chance_is_that_of_draws():
    random, whole = np.random.default_rng(0), np.array([50, 30, 15, 5])
    draws = [distance(random.multinomial(200, whole / 100), whole) for _ in range(400)]
    assert distance_by_chance(whole, 200) == pytest.approx(np.mean(draws), rel=0.1)


def test_coactivation_counts_pairs_and_lift_compares_with_chance():
    trace = make_trace(CHOICES * 10)
    together = coactivation(trace, 0)
    assert together.diagonal().tolist() == [30, 30, 10, 10]
    assert together[0, 1] == together[1, 0] == 20 and together[0, 2] == 10 and together[2, 3] == 0
    best = closest_pairs(together, trace.rows, 1)[0]
    assert (best.first, best.second, best.rows) == (0, 2, 10)
    assert best.lift == pytest.approx(10 / (30 * 10 / 40))


def test_sets_of_blocks():
    sets = block_sets(make_trace(CHOICES), 0, capacity=2)
    assert (sets.blocks, sets.mean, sets.largest) == (2, 3.0, 4)  # {0, 1} and {0, 1, 2, 3}
    assert sets.even == pytest.approx(4 * (1 - 0.5**2))
    assert sets.covered == pytest.approx((4 + 2) / 8)
    none = block_sets(make_trace(CHOICES, block=np.full(4, -1)), 0, capacity=2)
    assert none.blocks == 0 and none.mean == 0.0


def test_changes_between_two_models():
    a, b = make_trace(CHOICES), make_trace([[0, 1], [0, 3], [1, 3], [1, 3]])
    change = routing_changes(a, b)[0]
    assert change.differ == 0.5 and change.differ_by_ratio == [0.5]
    assert change.experts == pytest.approx((0 + 0.5 + 1 + 0) / 4)
    assert change.load == pytest.approx(np.abs(np.array([3, 3, 1, 1]) - np.array([2, 3, 0, 3])).sum() / 8 / 2)
    with pytest.raises(ValueError, match="other rows"):
        routing_changes(a, make_trace(CHOICES[:2]))
