"""Estimators on tables in the place of a model: draws, strata, shared masks, and how an answer is cut."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import replace

import pytest
import torch

from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.llada_moe.evaluation.estimators import Estimate, draw, estimate, greedy
from llada_megatron.llada_moe.evaluation.likelihood_scores import record_of, summarised, together
from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
from llada_megatron.llada_moe.evaluation.queries import ModelKind, Pair, parts, rolling
from llada_megatron.llada_moe.evaluation.scored_lines import ScoredLine

MASK = 0
FULL = ModelKind(MASK, fills_masks=True)
AUTOREGRESSIVE = ModelKind(MASK, fills_masks=False)


@pytest.mark.parametrize("length", [2, 3, 4, 5, 12, 16, 20])
def test_every_number_of_masked_tokens_is_equally_likely(length):
    """Over all that a stratum may begin with; where L / b is half a number, rounding to even would prefer even ones."""
    protocol = LikelihoodProtocol(samples=8 * 400, stratum=8)
    pair = Pair((1,), tuple(range(2, 2 + length)))
    (part,) = parts(pair, None)
    strata = draw(part, pair, 0, protocol)
    by_start = {tuple(map(len, stratum)) for stratum in strata}
    assert len(by_start) == length, "a stratum begins anywhere"
    counted = Counter(count for stratum in by_start for count in stratum)
    assert counted == dict.fromkeys(range(1, length + 1), 8)
    for stratum in by_start:
        assert max(Counter(stratum).values()) - min(Counter(stratum)[i] for i in range(1, length + 1)) <= 1


def test_every_position_is_masked_equally_often():
    protocol = LikelihoodProtocol(samples=8 * 500, stratum=8)
    pair = Pair((1, 2), (3, 4, 5, 6))
    (part,) = parts(pair, None)
    masked = [m for stratum in draw(part, pair, 0, protocol) for m in stratum]
    times = Counter(position for positions in masked for position in positions)
    assert set(times) == {2, 3, 4, 5}
    assert max(times.values()) - min(times.values()) < 5 * 4000**0.5
    assert all(list(positions) == sorted(set(positions)) for positions in masked)


def test_masks_are_shared_by_the_options_of_a_question_only():
    protocol = LikelihoodProtocol(samples=8)
    one, other = Pair((1,), (2, 3, 4), 7, 0), Pair((1, 5), (4, 5, 6), 7, 1)

    def of(pair, protocol=protocol, number=0):
        (part,) = parts(pair, None)
        return [[tuple(i - part.first for i in m) for m in stratum] for stratum in draw(part, pair, number, protocol)]

    assert of(one) == of(other)
    assert of(one) != of(replace(one, question=8))
    assert of(one) != of(one, number=1)
    assert of(one) != of(one, replace(protocol, seed=1))
    apart = replace(protocol, shared_masks=False)
    assert of(one, apart) != of(other, apart)


class Table:
    """log p = -a[token] * (0.3 + masked / L) + b[token, number of the masks]: a random model that costs nothing."""

    def __init__(self, seed: int, vocab: int, length: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.cost = torch.rand(vocab, generator=generator).double() * 2
        self.length, self.asked = length, 0
        self.mixed = torch.randn(vocab, 1 << length, generator=generator).double()

    def __call__(self, queries):
        self.asked += len(queries)
        found = []
        for query in queries:
            bits = sum(1 << (row - query.given) for row in query.rows)
            labels = torch.tensor(query.labels)
            masked = 0.3 + len(query.rows) / self.length
            values = -self.cost[labels] * masked - self.mixed[labels, bits].abs()
            found.append(torch.stack([values, values], dim=1))
        return found


def test_equal_masks_are_run_once_and_one_position_once():
    table = Table(0, 10, 8)
    short, single = estimate(table, [Pair((1,), (2, 3)), Pair((1,), (4,))], LikelihoodProtocol(), FULL)
    assert short.queries == 3
    assert (single.queries, single.standard_error) == (1, 0.0)
    assert table.asked == 4
    assert short.standard_error > 0
    (unknown,) = estimate(table, [Pair((1,), (2, 3))], LikelihoodProtocol(samples=8), FULL)
    assert unknown.standard_error is None, "one stratum does not tell its error"


def test_an_answer_is_cut_at_the_blocks_of_the_model():
    pair = Pair((1, 2, 3), (4, 5, 6, 7, 8, 9))
    cut = parts(pair, 4)
    assert [(part.first, part.stop, len(part.tokens)) for part in cut] == [(3, 4, 4), (4, 8, 8), (8, 9, 9)]
    assert cut[1].query((5, 7), MASK).tokens == (1, 2, 3, 4, 5, 0, 7, 0)
    assert cut[1].query((5, 7), MASK).labels == (6, 8)
    assert parts(Pair((1,), ()), 4) == []


def test_a_whole_text_is_scored_once_in_windows_that_fit():
    text = tuple(range(100, 123))
    for prefix in (None, 1):
        windows = rolling(text, 10, prefix)
        assert tuple(token for window in windows for token in window.answer) == text
        assert all(len(window.context) + len(window.answer) <= 10 for window in windows)
        assert len(windows[-1].context) + len(windows[-1].answer) == 10, "the last one sees as much as fits"
        assert windows[0].context == (() if prefix is None else (1,))
        assert all(window.context for window in windows[1:]) or prefix is None
    assert [window.option for window in windows] == list(range(len(windows)))


def test_the_error_of_a_text_in_windows_is_the_spread_over_seeds():
    """Equal windows under the same masks would err alike: twice the error of independent ones, where there are four."""
    table, windows = Table(3, 10, 4), rolling((2, 3, 4, 5) * 4, 4, None, question=7)
    found = [together(estimate(table, windows, LikelihoodProtocol(samples=64, seed=s), FULL)) for s in range(60)]
    assert all(len(window.context) == 0 for window in windows) and len(windows) == 4
    told = statistics.mean(each.standard_error for each in found)
    assert statistics.stdev(each.nats for each in found) == pytest.approx(told, rel=0.4)


def test_the_margin_to_an_exact_option_has_the_error_of_the_other():
    """An option of one token is exact and has one stratum."""
    line = ScoredLine(1, (1,), ((2,), (3, 4, 5), (6,)), right=0)
    exact, drawn, behind = Estimate(-1.0, 0.0, 1, 1, (-1.0,)), Estimate(-3.0, 0.2, 3, 8, (-2.8, -3.2)), -9.0
    last = Estimate(behind, 0.0, 1, 1, (behind,))
    for options, error in (((exact, drawn, last), 0.2), ((drawn, exact, last), 0.2), ((exact, last, last), 0.0)):
        assert record_of(line, options)["margin_error"] == error
    one_stratum = replace(drawn, standard_error=None, strata=(-3.0,))
    assert record_of(line, (exact, one_stratum, last))["margin_error"] is None
    assert summarised([record_of(line, (exact, drawn, last))]).undecided == 0


def test_protocols_that_cannot_be_are_refused():
    table, pair = Table(0, 10, 4), Pair((1,), (2, 3))
    with pytest.raises(ConfigError, match="a multiple of the stratum"):
        LikelihoodProtocol(samples=12)
    with pytest.raises(ConfigError, match="one of bound"):
        LikelihoodProtocol(estimator="elbo")
    with pytest.raises(ConfigError, match="has its exact one"):
        estimate(table, [pair], LikelihoodProtocol("bound"), AUTOREGRESSIVE)
    with pytest.raises(ConfigError, match="next-token: a diffusion model"):
        estimate(table, [pair], LikelihoodProtocol("next-token"), FULL)
    with pytest.raises(ConfigError, match="cannot mask"):
        estimate(table, [pair], LikelihoodProtocol("next-token", guidance=1.0), AUTOREGRESSIVE)
    with pytest.raises(DataError, match="needs a context"):
        estimate(table, [Pair((), (2, 3))], LikelihoodProtocol("next-token"), AUTOREGRESSIVE)
    with pytest.raises(DataError, match="an answer of 2 tokens"):
        pair.fitted(1)
    assert Pair((1, 2, 3), (4, 5)).fitted(3).context == (3,)


def test_greedy_follows_the_most_confident_position():
    """The best token of position 1 is another than the answer's, but only while position 2 is masked."""

    def score(queries):
        found = []
        for query in queries:
            rows = []
            for row in query.rows:
                wrong = row == 1 and 2 in query.rows
                rows.append([-2.0, -1.5] if wrong else [-0.1 * row, -0.1 * row])
            found.append(torch.tensor(rows, dtype=torch.float64))
        return found

    assert greedy(score, [Pair((1,), (5, 6))], FULL) == [True]
    assert greedy(score, [Pair((1,), (5,))], FULL) == [True]

    def worse(queries):
        return [values - torch.tensor([[0.01, 0.0]]) for values in score(queries)]

    assert greedy(worse, [Pair((1,), (5, 6))], FULL) == [False]
