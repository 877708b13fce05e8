"""Spans of text: chosen alike for every model, filled from both sides, and the autoregressive baseline."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.evaluation.infill_spans import (
    Filled,
    InfillSpan,
    choose_infill_spans,
    infill_figures,
)
from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
from llada_megatron.llada_moe.evaluation.python_functions import functions_of
from llada_megatron.parallel import build
from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
from llada_megatron.parallel.evaluation import infill_run
from llada_megatron.parallel.evaluation.infill_run import continue_left_to_right, reranked, span_costs
from llada_megatron.parallel.evaluation.query_scorer import kind_of
from llada_megatron.tools.bench.layouts import parity_run
from tests.parallel.evaluation.test_query_scorer import enumerated_span, exact_bound
from tests.parallel.sampling.spread import MODELS, load

TEXT = (5, 9, 17, 33, 34, 77, 12, 60, 61)


@pytest.fixture(scope="module")
def autoregressive(world):
    run = parity_run(MODELS["dense"], LayoutConfig(), objective="autoregressive")
    return LoadedModel(build.build_run_chunks(run)[0].eval(), run, Path(), {})


def test_spans_are_chosen_alike_and_leave_both_sides():
    texts = [tuple(range(n)) for n in (5, 12, 30, 30, 40)]
    spans = choose_infill_spans(texts, (1, 4, 8), 3, seed=0)
    assert spans == choose_infill_spans(texts, (1, 4, 8), 3, seed=0)
    assert spans != choose_infill_spans(texts, (1, 4, 8), 3, seed=1)
    assert [len(span.truth) for span in spans] == [1, 1, 1, 4, 4, 4, 8, 8, 8]
    assert [span.number for span in spans] == list(range(9))
    for span in spans:
        assert min(len(span.before), len(span.after)) >= len(span.truth)
        assert span.before + span.truth + span.after == span.text


def test_the_cost_of_a_span_sees_both_sides(world):
    full = load(MODELS["dense"], LayoutConfig(), None)
    table = enumerated_span(full, TEXT, range(3, 6))
    spans = [InfillSpan(TEXT, 3, 6, number) for number in range(100)]
    nats = torch.tensor([each.nats for each in span_costs(full, spans, LikelihoodProtocol(samples=16))]).double()
    assert abs(float(nats.mean()) - exact_bound(table, 3)) < 4 * float(nats.std()) / 10
    changed = [dataclasses.replace(spans[0], text=(*TEXT[:8], 99))]
    assert span_costs(full, changed, LikelihoodProtocol(samples=16))[0].nats != pytest.approx(float(nats[0]), abs=1e-4)


def test_the_length_found_makes_the_text_most_likely(world, monkeypatch):
    full = load(MODELS["dense"], LayoutConfig(), None)
    spans = [InfillSpan(TEXT, 3, 5, 0), InfillSpan(TEXT, 2, 6, 1)]
    fillings = {1: [(40,), (9,)], 2: [(40, 41), (5, 5)], 3: [(7, 7, 7), (33, 34, 77)]}
    monkeypatch.setattr(infill_run, "fill", lambda served, some, length: fillings[length])
    served, protocol = SimpleNamespace(loaded=full, kind=kind_of(full)), LikelihoodProtocol("left-to-right")
    found = infill_run.length_found(served, spans, (1, 2, 3), protocol)
    for i, (span, (length, written)) in enumerate(zip(spans, found, strict=True)):
        costs = {}
        for each, made in fillings.items():
            text = InfillSpan((*span.before, *made[i], *span.after), span.start, len(TEXT) - len(span.truth) + each, i)
            costs[each] = span_costs(full, [text], protocol)[0].nats
        assert length == max(costs, key=costs.__getitem__) and written == fillings[length][i]


def test_a_full_text_is_cut_alike_for_every_length(world, monkeypatch):
    full = load(MODELS["dense"], LayoutConfig(), None)
    longest = full.run.model.max_sequence_length
    text, seen = tuple(4 + n % 70 for n in range(longest)), []
    spans = [InfillSpan(text, 60, 61, 0), InfillSpan(text, 8, 12, 1), InfillSpan(TEXT, 3, 5, 2)]

    def filled(served, some, length):
        seen.append(some)
        return [(7,) * length for _ in some]

    monkeypatch.setattr(infill_run, "fill", filled)
    served = SimpleNamespace(loaded=full, kind=kind_of(full))
    infill_run.length_found(served, spans, (1, 4, 16), LikelihoodProtocol("left-to-right"))
    assert seen[0] == seen[1] == seen[2] and seen[0][2] == spans[2]
    for span, cut in zip(spans, seen[0], strict=True):
        assert (cut.truth, cut.number) == (span.truth, span.number)
        assert span.before[-len(cut.before) :] == cut.before and span.after[: len(cut.after)] == cut.after
    assert [len(cut.text) - len(cut.truth) + 16 for cut in seen[0][:2]] == [longest, longest]


def test_a_baseline_stays_within_its_context(autoregressive):
    longest, widths = autoregressive.run.model.max_sequence_length, []
    text = tuple(4 + n % 70 for n in range(longest))

    def logits(tokens, *others):
        widths.append(tokens.shape[1])
        return autoregressive.logits(tokens, *others)

    watched = SimpleNamespace(run=autoregressive.run, logits=logits)
    written = continue_left_to_right(watched, [InfillSpan(text, longest - 2, longest - 1, 0)], 0.0, 0, length=6)
    assert len(written[0]) == 6 and max(widths) == longest - 1
    cut = InfillSpan(text[4:], longest - 6, longest - 5, 0)
    assert continue_left_to_right(autoregressive, [cut], 0.0, 0, length=6) == written


def test_an_autoregressive_model_continues_and_is_ranked_by_the_right_side(autoregressive):
    spans = [InfillSpan(TEXT, 3, 5, 0), InfillSpan(TEXT, 2, 6, 1)]
    written = continue_left_to_right(autoregressive, spans, 0.0, seed=0)
    assert [len(each) for each in written] == [2, 4]
    alone = [continue_left_to_right(autoregressive, [span], 0.0, seed=0)[0] for span in spans]
    assert written == alone
    drafts = [continue_left_to_right(autoregressive, spans, 1.0, seed=0, draw=draw) for draw in range(3)]
    assert len(set(map(str, drafts))) == 3, "draws differ"
    candidates = [list(each) for each in zip(written, *drafts, strict=True)]
    best = reranked(autoregressive, spans, candidates)
    for span, options, chosen in zip(spans, candidates, best, strict=True):
        costs = []
        for option in options:
            text = InfillSpan((*span.before, *option, *span.after), span.start, len(TEXT), 0)
            (cost,) = span_costs(autoregressive, [text], LikelihoodProtocol("next-token"), sides=False)
            costs.append(cost.nats)
        assert chosen == options[costs.index(max(costs))]
        assert costs[options.index(chosen)] >= costs[0]


def test_a_longer_continuation_begins_like_a_shorter_one(autoregressive):
    spans = [InfillSpan(TEXT, 3, 5, 0), InfillSpan(TEXT, 2, 6, 1)]
    short = continue_left_to_right(autoregressive, spans, 1.0, seed=0, draw=1)
    long = continue_left_to_right(autoregressive, spans, 1.0, seed=0, draw=1, length=6)
    assert [len(each) for each in long] == [6, 6]
    assert [each[: len(span.truth)] for each, span in zip(long, spans, strict=True)] == short


def test_figures_of_fillings():
    span = InfillSpan((1, 2, 3, 4), 1, 3, 0)
    found = infill_figures([Filled(span, (2, 3), True), Filled(span, (2, 9), False), Filled(span, (2,))])
    assert found["exact"]["value"] == pytest.approx(1 / 3)
    assert found["exact"]["error"] == pytest.approx(1 / 3)
    assert found["token_accuracy"]["value"] == pytest.approx(4 / 6)
    assert found["token_accuracy"]["error"] == pytest.approx(1 / 6)
    assert found["length_right"]["value"] == pytest.approx(2 / 3)
    assert (found["parses"]["value"], found["parsed"]) == (0.5, 2)
    assert infill_figures([Filled(span, (2, 3))])["exact"] == {"value": 1.0, "error": None}


def test_functions_of_python_code():
    code = (
        "class A:\n    @cache\n    def f(self):\n        return 1\n\n    x = 2\n\n\n"
        "async def g():\n    def h(): ...\n    await h()\n"
    )
    assert list(functions_of(code)) == [
        "@cache\ndef f(self):\n    return 1\n",
        "async def g():\n    def h(): ...\n    await h()\n",
    ]
    assert not list(functions_of("def f(:\n")) and not list(functions_of("\0"))
