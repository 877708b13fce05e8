"""Shares are exact over a cycle, and any sample is found without the ones before it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.llada_moe.data.packing import RESOLUTION, Blend
from llada_megatron.llada_moe.errors import ConfigError


@given(st.lists(st.floats(0.01, 100, allow_nan=False), min_size=1, max_size=6))
def test_counting_agrees_with_locating(weights):
    try:
        blend = Blend(weights)
    except ConfigError:
        assert min(weights) / sum(weights) < 1.01 / RESOLUTION
        return
    seen = [0] * len(weights)
    for n in range(min(2 * len(blend) + 3, 3000)):
        chosen, before = blend.locate(n)
        assert before == seen[chosen]
        seen[chosen] += 1
    for k, weight in enumerate(weights):
        assert abs(blend.shares[k] - weight / sum(weights)) < 1 / RESOLUTION


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_whole_ratios_are_exact_over_every_cycle(parts):
    blend = Blend([p / 10 for p in parts])
    assert len(blend) <= sum(parts)
    for cycle in (0, 7):
        chosen = [blend.locate(cycle * len(blend) + i)[0] for i in range(len(blend))]
        assert [chosen.count(k) * sum(parts) for k in range(len(parts))] == [p * len(blend) for p in parts]


@given(st.lists(st.integers(1, 9), min_size=2, max_size=4), st.integers(0, 400))
def test_spread_evenly(parts, n):
    """After n samples no set is further than the number of sets from its share."""
    blend = Blend(parts)
    seen = [0] * len(parts)
    for i in range(n):
        seen[blend.locate(i)[0]] += 1
    assert all(abs(seen[k] - n * blend.shares[k]) < len(parts) for k in range(len(parts)))


def test_thirds_and_far_numbers():
    blend = Blend([1, 1, 1])
    assert len(blend) == 3 and blend.locate(10**15 + 1)[1] in (10**15 // 3, 10**15 // 3 + 1)
    assert Blend([0.7, 0.3]).counts == [7, 3]


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [1, float("nan")], [1, 1e-6]])
def test_impossible_weights(weights):
    with pytest.raises(ConfigError, match=r"data\.sets"):
        Blend(weights)
