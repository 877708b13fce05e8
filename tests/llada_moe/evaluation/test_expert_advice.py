"""Placement and simulations: never worse than before, exact where it can be worked out, groups kept together."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llada_megatron.llada_moe.evaluation.expert_advice import (
    balancing_bias,
    dropped_shares,
    factor_without_drops,
    imbalance_cost,
    pass_loads,
)
from llada_megatron.llada_moe.evaluation.expert_placement import balanced_order, rank_loads
from tests.llada_moe.evaluation.test_routing_statistics import make_trace


@example([0, 0, 3, 178, 2, 2, 2, 175], 2)  # dealt out and exchanged 182 to 180, as it stands 181 to 181
@given(st.lists(st.integers(0, 1000), min_size=8, max_size=8), st.sampled_from([2, 4]))
def test_a_placement_is_an_order_and_never_worse(load, ranks):
    load = np.array(load)
    order = balanced_order(load, ranks)
    assert sorted(order) == list(range(8))
    assert rank_loads(load, ranks, order).max() <= rank_loads(load, ranks).max()


def test_the_best_placement_is_found_where_dealing_out_alone_fails():
    load = np.array([8, 7, 6, 5, 4, 0])
    assert rank_loads(load, 2, balanced_order(load, 2)).tolist() == [15, 15]


@pytest.mark.parametrize(("ranks", "groups"), [(2, 4), (4, 2)])
def test_groups_stay_together(ranks, groups):
    load = np.random.default_rng(0).integers(0, 100, 8)
    order = balanced_order(load, ranks, groups)
    size = 8 // groups
    assert sorted(order) == list(range(8))
    for first in range(0, 8, size):
        assert len({expert // size for expert in order[first : first + size]}) == 1


def test_ranks_that_do_not_divide():
    with pytest.raises(ValueError, match="8 experts in 1 groups cannot be dealt out over 3 ranks"):
        balanced_order(np.ones(8), 3)


def test_cost_of_imbalance():
    passes = np.array([[[3, 3, 1, 1], [0, 4, 4, 0]]])  # one layer, two passes
    cost = imbalance_cost(passes, 2)
    assert cost.max_over_mean == pytest.approx((6 + 4) / (4 + 4))
    assert cost.lost == pytest.approx(1 - 8 / 10)
    assert imbalance_cost(passes, 2, [[0, 2, 1, 3]]).max_over_mean == pytest.approx(1.0)


def test_passes_of_several_ranks_hold_whole_windows():
    trace = make_trace([[0, 1]] * 2 + [[2, 3]] * 2 + [[0, 2]] * 2, window=np.repeat(np.arange(3), 2).astype(np.int32))
    assert pass_loads(trace, 1).shape == (1, 3, 4) and pass_loads(trace, 1).sum() == 12
    assert pass_loads(trace, 2).shape == (1, 1, 4) and pass_loads(trace, 2).sum() == 8


def test_capacity():
    passes = np.array([[[4, 2, 1, 1]]])
    assert factor_without_drops(passes) == 2.0
    assert dropped_shares(passes) == pytest.approx({1.0: 2 / 8, 1.25: 1.5 / 8, 1.5: 1 / 8, 2.0: 0.0})


def test_a_bias_evens_out_what_favours_one_expert():
    random = np.random.default_rng(0)
    scores = random.uniform(0, 0.5, (4000, 8)).astype(np.float32)
    scores[:, 3] += 0.3
    held_out = scores[1::2]
    found = balancing_bias(scores[0::2], held_out, top_k=2, rate=0.01)
    assert found.before > 2 and found.after <= 1.15 and found.bias.argmin() == 3
    chosen = np.argsort(-(held_out + found.bias), axis=1)[:, :2]
    load = np.bincount(chosen.ravel(), minlength=8)
    assert load.max() / load.mean() == pytest.approx(found.after)
