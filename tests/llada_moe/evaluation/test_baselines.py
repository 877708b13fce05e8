from __future__ import annotations

import math
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.llada_moe.evaluation import baselines
from llada_megatron.llada_moe.evaluation.baselines import Bigram, Unigram, zlib_bits_per_byte

VOCAB = 5


def rows(*windows: list[int]) -> list[np.ndarray]:
    return [np.array(window, np.int64) for window in windows]


def test_unigram_by_hand():
    training = baselines.token_counts(rows([0, 0, 1], [0, 1, 0]), [1.0, 1.0], 4)
    assert training.tolist() == [4, 2, 0, 0]
    cost = Unigram.fit(training).measure(rows([1, 1, 0, 2]))  # (4+1)/10, (2+1)/10, 1/10, 1/10
    expected = -(math.log2(0.5) + math.log2(0.3) * 2 + math.log2(0.1))
    assert cost.bits_per_token * 4 == pytest.approx(expected)
    assert (cost.tokens, cost.sequences) == (4, 1)


def test_bigram_by_hand():
    unigram = Unigram(np.array([0.4, 0.3, 0.2, 0.1]))
    model = Bigram.fit(unigram, rows([0, 1, 0, 1], [0, 2, 2]), [1.0, 2.0])  # 01 twice, 10 once, 02 twice, 22 twice
    cost = model.measure(rows([0, 1], [3, 1], [1, 3]))
    after_0 = (2 + 2 * 0.3) / (4 + 2)  # seen twice of four, two kinds of token follow
    after_1 = (0 + 1 * 0.1) / (1 + 1)
    expected = [0.4, after_0, 0.1, 0.3, 0.3, after_1]  # training never continued a 3: the frequency of what follows
    assert cost.nats == pytest.approx(-sum(map(math.log, expected)))
    assert (cost.tokens, cost.sequences) == (6, 3)


@given(st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=9), min_size=1, max_size=6), st.integers(1, 3))
def test_bigram_is_a_distribution_and_does_not_depend_on_how_much_is_counted_at_once(windows, at_once):
    training = rows(*windows)
    unigram = Unigram.fit(baselines.token_counts(training, [1.0] * len(training), VOCAB))
    whole = Bigram.fit(unigram, training, [1.0] * len(training))
    for before in range(VOCAB):
        alone = -math.log(unigram.probabilities[before])
        costs = [whole.measure(rows([before, after])).nats - alone for after in range(VOCAB)]
        assert sum(math.exp(-cost) for cost in costs) == pytest.approx(1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "_AT_ONCE", at_once)
        parts = Bigram.fit(unigram, training, [1.0] * len(training))
    assert parts.pairs.tolist() == whole.pairs.tolist()
    assert parts.counts.tolist() == whole.counts.tolist()


def test_bigram_beats_unigram_where_pairs_tell_something():
    walk = np.cumsum(np.random.default_rng(0).integers(1, 3, (50, 40)), axis=1) % VOCAB
    unigram = Unigram.fit(baselines.token_counts(walk, np.ones(50), VOCAB))
    assert unigram.measure(walk).bits_per_token == pytest.approx(math.log2(VOCAB), rel=0.01)
    assert Bigram.fit(unigram, walk, np.ones(50)).measure(walk).bits_per_token == pytest.approx(1.0, abs=0.1)


def test_zlib_is_one_stream_over_the_windows():
    def decode(ids: list[int]) -> str:
        return "".join("añ…bc"[i] for i in ids)

    windows = rows([0, 1, 2, 3] * 8, [4, 1, 2] * 9)
    text = "".join(decode(row.tolist()) for row in windows).encode()
    assert zlib_bits_per_byte(windows, decode) == 8 * len(zlib.compress(text, 9)[2:-4]) / len(text) + 8 * 6 / len(text)
    assert math.isnan(zlib_bits_per_byte([], decode))


def test_training_counts_follow_the_shares_of_the_blend():
    class Set:
        def __init__(self, token: int, windows: int) -> None:
            self.token, self.windows = token, windows

        def window(self, index: int):
            return np.full(10, self.token), np.array([0, 10], np.int32)

    sets = [Set(0, 30), Set(1, 10)]
    weights = baselines.training_weights(sets, [0.25, 0.75])
    counts = baselines.token_counts(baselines.training_windows(sets), weights, 3)
    assert counts.tolist() == pytest.approx([100, 300, 0])
