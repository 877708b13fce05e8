"""Figures of a layer's load, against values worked out by hand."""

import math

import pytest

from llada_megatron.llada_moe.evaluation.expert_balance import balance_of


def test_an_even_layer():
    balance = balance_of([4, 4, 4, 4])
    assert (balance.max_over_mean, balance.variation, balance.dead, balance.overloaded) == (1.0, 0.0, 0, 0)
    assert balance.entropy == pytest.approx(1.0)


def test_an_uneven_layer():
    balance = balance_of([9, 3, 0, 0])
    assert balance.max_over_mean == 3.0 and balance.dead == 2 and balance.overloaded == 1
    assert balance.variation == pytest.approx(math.sqrt((36 + 0 + 9 + 9) / 4) / 3)
    assert balance.entropy == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4))


def test_a_layer_without_a_token_is_even_and_dead():
    balance = balance_of([0, 0])
    assert (balance.max_over_mean, balance.entropy, balance.dead) == (1.0, 1.0, 2)
