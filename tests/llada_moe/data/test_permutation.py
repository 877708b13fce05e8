"""The table-free permutation is one, and its keys matter."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.llada_moe.data.packing import mix, mix_all, permute


@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_every_element_once(size, seed):
    assert sorted(permute(i, size, (seed, 1)) for i in range(size)) == list(range(size))


def test_key_and_index_matter():
    orders = {tuple(permute(i, 100, (seed, epoch)) for i in range(100)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_places_are_evenly_used():
    """Over many keys, element 0 goes everywhere: chi-square over 10 places, 9 degrees of freedom."""
    counts = np.bincount([permute(0, 10, (seed,)) for seed in range(4000)], minlength=10)
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # 0.1 % quantile


def test_outside_is_refused():
    with pytest.raises(IndexError):
        permute(5, 5, (0,))


def test_golden():
    assert [permute(i, 11, (1, 2, 3)) for i in range(11)] == [7, 10, 9, 4, 6, 8, 2, 3, 1, 0, 5]


def test_vector_form_is_the_scalar_one():
    values = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    assert mix_all(values).tolist() == [mix(int(v)) for v in values]
