"""Every schedule beside the published formula, followed row by row and position by position."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.sampling.published import SCHEDULES
from llada_megatron.llada_moe.sampling.schedules import (
    CreditThreshold,
    EntropyBound,
    Factor,
    FixedSteps,
    FlooredThreshold,
    Hierarchical,
    RandomSteps,
    SlowFast,
    Stable,
    Threshold,
)
from tests.llada_moe.sampling.blocks import make_block, make_statistics

SHARE = st.integers(0, 64).map(lambda n: n / 64)
"""Ties are frequent, and sums exact."""


def tables(values: st.SearchStrategy, rows: int = 4, columns: int = 12) -> st.SearchStrategy:
    """Two tables of values and one of masks, of the same shape."""
    shapes = st.tuples(st.integers(1, rows), st.integers(1, columns))

    def of(shape: tuple[int, int], cell: st.SearchStrategy) -> st.SearchStrategy:
        row = st.lists(cell, min_size=shape[1], max_size=shape[1])
        return st.lists(row, min_size=shape[0], max_size=shape[0])

    return shapes.flatmap(lambda shape: st.tuples(of(shape, values), of(shape, values), of(shape, st.booleans())))


def by_confidence(confidence: list[float], masked: list[bool]) -> list[int]:
    """Masked places, the most confident first, the leftmost of equals."""
    return sorted((i for i, m in enumerate(masked) if m), key=lambda i: (-confidence[i], i))


def of_threshold(confidence, entropy, masked, step):
    order = by_confidence(confidence, masked)
    return {i for i in order if confidence[i] >= 0.75} | set(order[:1])


def of_llada2(confidence, entropy, masked, step):
    order = by_confidence(confidence, masked)
    shares = [len(masked) // 5 + (s < len(masked) % 5) for s in range(5)]
    floor = max(1, shares[step] if step < 5 else len(masked) // 5)
    high = [i for i in order if confidence[i] > 0.75]
    return set(high if len(high) >= floor else order[:floor])


def of_llada2_1(confidence, entropy, masked, step):
    order = by_confidence(confidence, masked)
    return {i for i in order if confidence[i] > 0.75} or set(order[:1])


def of_factor(confidence, entropy, masked, step):
    order = by_confidence(confidence, masked)
    passing = [n for n in range(1, len(order) + 1) if (n + 1) * (1 - confidence[order[n - 1]]) < 1.5]
    return set(order[: max(passing, default=1)])


def within_bound(order, entropy):
    chosen = set(order[:1])
    for n in range(1, len(order) + 1):
        sums = [entropy[i] for i in order[:n]]
        if sum(sums) - max(sums) <= 0.5:
            chosen = set(order[:n])
    return chosen


def of_entropy_bound(confidence, entropy, masked, step):
    return within_bound(sorted((i for i, m in enumerate(masked) if m), key=lambda i: (entropy[i], i)), entropy)


def of_confident_entropy_bound(confidence, entropy, masked, step):
    return within_bound(by_confidence(confidence, masked), entropy)


def of_hierarchical(confidence, entropy, masked, step):
    chosen = set(by_confidence(confidence, masked)[:1])
    for is_run, run in itertools.groupby(range(len(masked)), key=lambda i: masked[i]):
        places = list(run)
        if is_run:
            best = max(places, key=lambda i: (confidence[i], -i))
            chosen |= {i for i in places if confidence[i] > 0.75 or (i == best and confidence[i] > 0.25)}
    return chosen


def of_fixed_steps(confidence, entropy, masked, step):
    order = by_confidence(confidence, masked)
    steps = max(1, min(5, len(order)))
    shares = [len(order) // steps + (s < len(order) % steps) for s in range(steps)]
    return set(order[: max(1, shares[step] if step < steps else len(order) // steps)])


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        (Threshold(0.75), of_threshold),
        (CreditThreshold(0.75), of_threshold),
        (FlooredThreshold(0.75, 5), of_llada2),
        (FlooredThreshold(0.75, None), of_llada2_1),
        (Factor(1.5), of_factor),
        (EntropyBound(0.5), of_entropy_bound),
        (EntropyBound(0.5, "confidence"), of_confident_entropy_bound),
        (Hierarchical(0.75, 0.25), of_hierarchical),
        (FixedSteps(5), of_fixed_steps),
    ],
)
@settings(derandomize=True, deadline=None, max_examples=80)
@given(table=tables(SHARE), step=st.integers(0, 7))
def test_commits_what_the_published_formula_says(schedule, formula, table, step):
    confidence, entropy, masked = table
    block = make_block(masked, step=step)
    chosen = schedule.start(len(masked), len(masked[0])).select(make_statistics(confidence, entropy), block)
    expected = [formula(*row, step) if any(row[2]) else set() for row in zip(confidence, entropy, masked, strict=True)]
    assert [set(row.nonzero().flatten().tolist()) for row in chosen] == expected


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "self-speculation"])  # that one verifies
@settings(derandomize=True, deadline=None, max_examples=40)
@given(table=tables(st.floats(0, 1, width=32) | st.just(math.nan)), step=st.integers(0, 3))
def test_commits_masks_only_and_at_least_one_whatever_the_statistics(name, table, step):
    values, others, masked = table
    running = SCHEDULES[name]().start(len(masked), len(masked[0]))
    block = make_block(masked, step=step)
    running.reach(block)
    chosen = running.select(make_statistics(values, others, others), block)
    assert chosen.shape == block.masked.shape
    assert not (chosen & ~block.masked).any()
    assert torch.equal(chosen.any(1), block.masked.any(1))


def test_random_steps_are_the_same_for_a_sequence_wherever_it_stands():
    masked = [[True] * 8] * 3
    block, flipped = make_block(masked), make_block(masked, slots=[2, 1, 0])
    statistics = make_statistics([[0.5] * 8] * 3)
    chosen = RandomSteps(2).select(statistics, block)
    assert torch.equal(RandomSteps(2).select(statistics, flipped), chosen.flip(0))
    assert not torch.equal(chosen[0], chosen[1])
    assert not torch.equal(RandomSteps(2, seed=1).select(statistics, block), chosen)
    assert chosen.sum(1).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("schedule", "values", "message"),
    [
        (Threshold, {"threshold": 1.5}, "between 0 and 1"),
        (FixedSteps, {"steps": 0}, "at least 1"),
        (FlooredThreshold, {"steps": 0}, "at least 1"),
        (Factor, {"factor": -1.0}, "at least 0"),
        (EntropyBound, {"gamma": math.nan}, "at least 0"),
        (Hierarchical, {"low": -0.1}, "between 0 and 1"),
        (CreditThreshold, {"beta": 2.0}, "between 0 and 1"),
        (SlowFast, {"exploration": 0}, "at least 1"),
        (Stable, {"history": 0}, "at least 1"),
    ],
)
def test_refuses_settings_out_of_range(schedule, values, message):
    with pytest.raises(ConfigError, match=message):
        schedule(**values)
