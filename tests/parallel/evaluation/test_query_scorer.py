"""Every estimator against exact enumeration on a real model, and every layout against one process."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.evaluation import estimators
from llada_megatron.llada_moe.evaluation.estimators import bound_queries, estimate
from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
from llada_megatron.llada_moe.evaluation.queries import ModelKind, Pair, ask, parts
from llada_megatron.llada_moe.model.patterns import CAUSAL, AttentionPattern, whole_sequences
from llada_megatron.llada_moe.objectives import make_objective
from llada_megatron.llada_moe.objectives.joint import JointConfig
from llada_megatron.parallel import topology
from llada_megatron.parallel.evaluation.query_scorer import QueryScorer, kind_of
from tests.parallel.sampling.spread import GRID, MASK, MODELS, load
from tests.ranks import run_ranks

CONTEXT, ANSWER = (5, 9, 17), (33, 34, 77, 12)
PAIR = Pair(CONTEXT, ANSWER)
LONG = Pair((5, 9, 17, 44, 45, 46), (33, 34, 77, 12, 60))
"""Lies in two blocks: two positions in the first, three in the second."""


@pytest.fixture(scope="module")
def full(world):
    return load(MODELS["dense"], LayoutConfig(), None)


@pytest.fixture(scope="module")
def blocks(world):
    return load(MODELS["dense"], LayoutConfig(), GRID)


def enumerated(loaded, pair, positions):
    return enumerated_span(loaded, (*pair.context, *pair.answer), positions)


def enumerated_span(loaded, text, positions):
    """By mask set over `positions`: log p of each masked position, by way of the whole logits of whole sequences."""
    text = torch.tensor(text)
    sets = [s for size in range(1, len(positions) + 1) for s in itertools.combinations(positions, size)]
    tokens, rows = text.repeat(len(sets), 1), torch.zeros(len(sets), len(text), dtype=torch.bool)
    for number, masked in enumerate(sets):
        rows[number, list(masked)] = True
    tokens[rows] = MASK
    logits = loaded.logits(tokens, rows, whole_sequences(*tokens.shape)).double().log_softmax(-1)
    found = iter(logits.gather(1, text.repeat(len(sets), 1)[rows][:, None])[:, 0].tolist())
    return {masked: dict(zip(masked, itertools.islice(found, len(masked)), strict=True)) for masked in sets}


def exact_bound(table, length):
    by_size = [[length / n * sum(v.values()) for s, v in table.items() if len(s) == n] for n in range(1, length + 1)]
    return sum(sum(values) / len(values) for values in by_size) / length


def in_order(table, orders):
    """Mean over orders of the sum of log p of each position when it is unmasked."""
    totals = [sum(table[tuple(sorted(order[k:]))][order[k]] for k in range(len(order))) for order in orders]
    return sum(totals) / len(totals)


def remembered(score):
    """The same answers, each computed once."""
    known = {}

    def answer(queries):
        new = [query for query in dict.fromkeys(queries) if query not in known]
        known.update(zip(new, score(new), strict=True))
        return [known[query] for query in queries]

    return answer


@pytest.fixture(scope="module")
def oracle(full):
    return enumerated(full, PAIR, range(3, 7))


@pytest.fixture(scope="module")
def score(full):
    return remembered(QueryScorer(full))


def test_the_bound_is_the_mean_over_all_orders(oracle):
    assert exact_bound(oracle, 4) == pytest.approx(
        in_order(oracle, list(itertools.permutations(range(3, 7)))), abs=1e-9
    )


def test_the_bound_is_within_four_standard_errors(full, oracle, score):
    exact = exact_bound(oracle, 4)
    pairs = [dataclasses.replace(PAIR, question=q) for q in range(200)]
    found = estimate(score, pairs, LikelihoodProtocol(samples=64), kind_of(full))
    scores = torch.tensor([(each.nats - exact) / each.standard_error for each in found])
    mean = torch.tensor([each.nats for each in found]).double()
    assert abs(float(mean.mean()) - exact) < 4 * float(mean.std()) / 200**0.5
    assert float(mean.std()) > 0.01
    assert 0.8 < float(scores.std()) < 1.6, "standard errors say how far estimates are off (Student's t, 7 degrees)"


def test_the_error_falls_with_the_square_root_of_the_samples(full, oracle, score):
    exact = exact_bound(oracle, 4)
    pairs = [dataclasses.replace(PAIR, question=q) for q in range(200)]
    errors = []
    for samples in (8, 32):
        found = estimate(score, pairs, LikelihoodProtocol(samples=samples), kind_of(full))
        errors.append(math.sqrt(sum((each.nats - exact) ** 2 for each in found) / len(found)))
    assert 1.6 < errors[0] / errors[1] < 2.5


def test_chains_are_what_enumeration_says(full, oracle, score):
    kind = kind_of(full)
    (left,) = estimate(score, [PAIR], LikelihoodProtocol("left-to-right"), kind)
    assert left.nats == pytest.approx(in_order(oracle, [tuple(range(3, 7))]), abs=1e-5)
    remaining, total = tuple(range(3, 7)), 0.0
    while remaining:
        surest = max(remaining, key=oracle[remaining].__getitem__)
        total += oracle[remaining][surest]
        remaining = tuple(i for i in remaining if i != surest)
    (chain,) = estimate(score, [PAIR], LikelihoodProtocol("confidence"), kind)
    assert chain.nats == pytest.approx(total, abs=1e-5)
    assert (chain.standard_error, chain.queries) == (0.0, 4)


def test_gradient_of_the_bound_is_within_four_standard_errors(full):
    """Of the last norm's weights, whose gradient every query has; estimates weigh the same gradients differently."""
    kind = kind_of(full)
    parameter = full.model.decoder.final_layernorm.weight
    draws = [
        {each.query: each.weight for each in bound_queries(dataclasses.replace(PAIR, question=q), protocol, kind)}
        for protocol in [LikelihoodProtocol(samples=16)]
        for q in range(200)
    ]
    gradients = {}
    for query in {query for drawn in draws for query in drawn}:
        rows = torch.zeros(1, 7, dtype=torch.bool)
        rows[0, list(query.rows)] = True
        logits = full.model(torch.tensor([query.tokens]), whole_sequences(1, 7), rows=rows)
        value = logits.double().log_softmax(-1)[range(len(query.rows)), list(query.labels)].sum()
        gradients[query.rows] = torch.autograd.grad(value, parameter)[0].double()
    assert len(gradients) == 15
    exact = sum(gradients[s] / len(s) / math.comb(4, len(s)) for s in gradients)
    found = torch.stack([sum(w * gradients[query.rows] for query, w in drawn.items()) for drawn in draws])
    error = found.std(0) / len(draws) ** 0.5
    assert float(error.max()) > 0
    assert bool(((found.mean(0) - exact).abs() < 4 * error + 1e-9).all())


def test_a_block_causal_model_sums_over_its_blocks(blocks):
    kind = kind_of(blocks)
    assert kind.block == GRID
    first, second = enumerated(blocks, LONG, range(6, 8)), enumerated(blocks, LONG, range(8, 11))
    exact = exact_bound(first, 2) + exact_bound(second, 3)
    score = remembered(QueryScorer(blocks))
    found = estimate(score, [dataclasses.replace(LONG, question=q) for q in range(100)], LikelihoodProtocol(), kind)
    nats = torch.tensor([each.nats for each in found]).double()
    assert abs(float(nats.mean()) - exact) < 4 * float(nats.std()) / 10
    (left,) = estimate(score, [LONG], LikelihoodProtocol("left-to-right"), kind)
    assert left.nats == pytest.approx(in_order(first, [(6, 7)]) + in_order(second, [(8, 9, 10)]), abs=1e-5)


MANY = Pair(tuple(range(20, 31)), tuple(range(40, 70)), 3)
"""Its answer lies in five blocks."""


def apart(own, masked, mask_id, rows=None):
    """Every part by a query of its own."""
    return [each for b, m in masked.items() for each in ask(own, {b: m}, mask_id, rows and {b: rows[b]})]


@pytest.mark.parametrize("guidance", [0.0, 0.5])
@pytest.mark.parametrize("name", ["dense", "routed by blocks"])
def test_blocks_asked_at_once_give_what_each_alone_gives(world, monkeypatch, name, guidance):
    """One run of [x_t ; x_0] in the place of one of each block's prefix, beside texts that are run as they are."""
    loaded = load(MODELS[name], LayoutConfig(), GRID)
    kind, scorer = kind_of(loaded), QueryScorer(loaded, guidance)
    cut = parts(MANY, GRID)
    masked = {b: tuple(sorted({part.first, part.stop - 1})) for b, part in enumerate(cut)}
    (joint,) = ask(cut, masked, MASK)
    alone = [each.query for each in apart(cut, masked, MASK)]
    assert (joint.query.positions, sum(each.positions for each in alone)) == (82, 16 + 24 + 32 + 40 + 41)
    together, *others = scorer([joint.query, *alone])
    assert torch.allclose(together, torch.cat(others), atol=2e-4)
    for protocol in (
        LikelihoodProtocol(samples=8),
        LikelihoodProtocol("confidence"),
        LikelihoodProtocol("left-to-right"),
    ):
        (at_once,) = estimate(scorer, [MANY], protocol, kind)
        with monkeypatch.context() as patch:
            patch.setattr(estimators, "ask", apart)
            (one_by_one,) = estimate(scorer, [MANY], protocol, kind)
        assert at_once.nats == pytest.approx(one_by_one.nats, abs=5e-3)
        assert at_once.standard_error == one_by_one.standard_error or protocol.is_bound
        assert at_once.queries < one_by_one.queries / 2
    assert estimators.greedy(scorer, [MANY], kind) == [False]
    assert loaded.model.pattern == AttentionPattern(GRID)


def test_an_autoregressive_model_has_its_exact_value(full):
    before = full.model.pattern
    try:
        full.model.use_pattern(CAUSAL)
        text = torch.tensor([[*CONTEXT, *ANSWER]])
        rows = torch.zeros(1, 7, dtype=torch.bool)
        rows[0, 2:6] = True
        logits = full.logits(text, rows, whole_sequences(1, 7)).double().log_softmax(-1)
        exact = float(logits[range(4), list(ANSWER)].sum())
        (found,) = estimate(QueryScorer(full), [PAIR], LikelihoodProtocol("next-token"), ModelKind(MASK, False))
    finally:
        full.model.use_pattern(before)
    assert found.nats == pytest.approx(exact, abs=1e-5)
    assert (found.queries, found.standard_error) == (1, 0.0)


def test_a_joint_model_has_the_figures_of_both_its_losses(world):
    """By next tokens as it verifies; by masks as it was trained, blocks behind a text that is read causally."""
    loaded = load(MODELS["dense"], LayoutConfig(), GRID, causal=True)
    objective = JointConfig(kind="joint", block_size=GRID)
    loaded = dataclasses.replace(loaded, run=dataclasses.replace(loaded.run, objective=objective))
    kind, scorer = kind_of(loaded), QueryScorer(loaded)
    assert (kind.block, kind.fills_masks, kind.verifies) == (GRID, True, True)
    text = torch.tensor([[*LONG.context, *LONG.answer]])
    rows = torch.zeros(1, 22, dtype=torch.bool)
    rows[0, 5:10] = True
    exact = loaded.logits(text, rows[:, :11], whole_sequences(1, 11)).double().log_softmax(-1)
    (found,) = estimate(scorer, [LONG], LikelihoodProtocol(), kind)
    assert found.nats == pytest.approx(float(exact[range(5), list(LONG.answer)].sum()), abs=1e-5)
    assert (found.queries, found.standard_error) == (1, 0.0)
    left = 0.0
    for first, stop in ((6, 8), (7, 8), (8, 11), (9, 11), (10, 11)):
        noisy, rows = text.clone(), torch.zeros(1, 22, dtype=torch.bool)
        noisy[0, first:stop], rows[0, first] = MASK, True
        loaded.model.use_pattern(make_objective(objective).pattern(0))
        logits = loaded.logits(torch.cat([noisy, text], 1), rows, torch.tensor([0, 11, 22], dtype=torch.int32))
        loaded.model.use_pattern(CAUSAL)
        left += float(logits.double().log_softmax(-1)[0, text[0, first]])
    (chain,) = estimate(scorer, [LONG], LikelihoodProtocol("left-to-right"), kind)
    assert chain.nats == pytest.approx(left, abs=1e-4)
    single = Pair((*LONG.context, *LONG.answer[:4]), LONG.answer[4:])
    bound, chain = (estimate(scorer, [single], LikelihoodProtocol(name), kind)[0] for name in ("bound", "confidence"))
    assert bound.nats == pytest.approx(chain.nats, abs=1e-6)
    written = Pair(LONG.context, (int(exact[0].argmax()),))
    assert estimators.greedy(scorer, [written, LONG], kind) == [True, False]
    with pytest.raises(ConfigError, match="next-token has no mask for the context; use bound"):
        estimate(scorer, [LONG], LikelihoodProtocol(guidance=1.0), kind)


def test_guidance_mixes_the_logits_of_a_masked_context(full):
    everything, rows = torch.tensor([[*CONTEXT, *[MASK] * 4]]), torch.zeros(1, 7, dtype=torch.bool)
    rows[0, 3:] = True
    given, hidden = (
        full.logits(tokens, rows, whole_sequences(1, 7)).double()
        for tokens in (everything, torch.full_like(everything, MASK))
    )
    mixed = (hidden + 1.5 * (given - hidden)).log_softmax(-1)[range(4), list(ANSWER)]
    protocol = LikelihoodProtocol("left-to-right", guidance=0.5)
    (query,) = [q.query for q in bound_queries(PAIR, LikelihoodProtocol(), kind_of(full)) if len(q.query.rows) == 4]
    (found,) = QueryScorer(full, guidance=0.5)([query])
    assert found[:, 0].tolist() == pytest.approx(mixed.tolist(), abs=1e-4)
    (plain,) = QueryScorer(full)([query])
    assert float((plain - found)[:, 0].abs().max()) > 0.05
    (guided,) = estimate(QueryScorer(full, 0.5), [PAIR], protocol, kind_of(full))
    assert guided.nats < 0


def ragged():
    """Pairs of very different lengths."""
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for number in range(8):
        text = torch.randint(0, 120, (int(torch.randint(3, 40, (1,), generator=generator)),), generator=generator)
        cut = 1 + number % (len(text) - 1)
        pairs.append(Pair(tuple(text[:cut].tolist()), tuple(text[cut:].tolist()), number))
    return pairs


def test_a_batch_gives_what_each_text_alone_gives(full):
    queries = [each.query for pair in ragged() for each in bound_queries(pair, LikelihoodProtocol(samples=8), FULL)]
    together = QueryScorer(full)(queries)
    alone = QueryScorer(full, positions=1)
    for query, rows in zip(queries, together, strict=True):
        assert torch.allclose(alone([query])[0], rows, atol=2e-5)


FULL = ModelKind(MASK, True)
LAYOUTS = {
    "PP2": ("routed by blocks", LayoutConfig(pipeline_parallel=2), GRID),  # tensor ranks: test_served_model
    "EP2": ("experts", LayoutConfig(data_parallel=2, expert_parallel=2), None),
}


def scored(model, layout, block):
    """On a rank: the estimates of pairs, in passes of few positions, so that replicas have unequally many."""
    topology.initialize(layout, 0)
    loaded = load(MODELS[model], layout, block)
    kind, found = kind_of(loaded), []
    for protocol in (LikelihoodProtocol(samples=8, guidance=0.5), LikelihoodProtocol("confidence")):
        scorer = QueryScorer(loaded, protocol.guidance, positions=100)
        found += [each.nats for each in estimate(scorer, [*ragged()[:4], MANY], protocol, kind)]
    torch.distributed.barrier()
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_gives_what_one_process_gives(name):
    model, layout, block = LAYOUTS[name]
    (alone,) = run_ranks(scored, 1, model, LayoutConfig(), block, timeout=60.0)
    ranks = run_ranks(scored, layout.world_size, model, layout, block, timeout=90.0)
    assert all(found == ranks[0] for found in ranks), "ranks disagree"
    assert ranks[0] == pytest.approx(alone, abs=1e-3, rel=1e-5)
