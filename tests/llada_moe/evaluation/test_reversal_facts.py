"""Made-up facts: what is trained of whom, that nothing of what is asked leaks, and how answers are graded."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from tokenizers import Tokenizer

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.evaluation.reversal_facts import (
    DESCRIPTION_FIRST,
    LENGTHS,
    NAME_FIRST,
    TRAINED,
    make_facts,
    shuffled,
)
from llada_megatron.llada_moe.evaluation.reversal_figures import (
    ARMS,
    AUTOREGRESSIVE,
    DIFFUSION,
    OverSeeds,
    SeedFigures,
    counting,
    over_seeds,
    reversal_claims,
    seed_figures,
)


@pytest.fixture(scope="module")
def made():
    return make_facts(3)


def test_names_their_parts_and_descriptions_are_unique(made):
    names, descriptions = [fact.name for fact in made.facts], [fact.description for fact in made.facts]
    assert len(set(names)) == len(set(descriptions)) == len(made.facts) == 200
    assert len({part.lower() for part in made.first_parts + made.second_parts}) == 2 * len(made.facts)
    assert names == [a + b for a, b in zip(made.first_parts, made.second_parts, strict=True)]
    assert {len(text.split()) for text in descriptions} == set(LENGTHS)
    assert sorted(Counter(fact.group for fact in made.facts).values()) == [66, 67, 67]
    assert make_facts(0) == make_facts(0) != make_facts(1)


def test_every_group_is_trained_in_its_orders_only_and_no_question_is_trained(made):
    texts = list(made.training_texts())
    assert len(texts) == len(set(texts)) == (67 + 67 + 2 * 66) * TRAINED
    orders: dict[str, set[bool]] = {fact.name: set() for fact in made.facts}
    named = {fact.name: fact for fact in made.facts}
    for text in texts:
        (fact,) = [named[word] for word in text.split() if word in named]
        assert fact.description in text, "a sentence tells the whole of one fact"
        orders[fact.name].add(text.index(fact.name) < text.index(fact.description))
    expected = {"name first": {True}, "description first": {False}, "both": {True, False}}
    assert all(orders[fact.name] == expected[fact.group] for fact in made.facts)
    asked = {" ".join(filter(None, question.parts(made.facts))) for question in made.questions()}
    assert not asked & set(texts), "held-out templates"


def test_questions_ask_each_group_in_the_order_that_they_say(made):
    found = Counter()
    for question in made.questions():
        fact = made.facts[question.fact]
        before, answer, after = question.parts(made.facts)
        given, name_first = fact.description if question.about == "name" else fact.name, question.template in NAME_FIRST
        assert answer == getattr(fact, question.about) and given in f"{before} {after}"
        assert question.template in (NAME_FIRST + DESCRIPTION_FIRST)
        assert question.template not in NAME_FIRST[:TRAINED] + DESCRIPTION_FIRST[:TRAINED]
        assert (question.ask == "reordered") == (name_first != (fact.group == "name first"))
        assert bool(after) == (question.ask == "in place") and before
        found[question.ask, question.about, fact.group] += 1
    assert found == {
        ("forward", "description", "name first"): 134,
        ("forward", "name", "description first"): 134,
        ("in place", "name", "name first"): 134,
        ("reordered", "name", "name first"): 134,
        ("reordered", "description", "description first"): 134,
    }, "of the group that is trained in both orders nothing is asked"


def test_the_vocabulary_knows_every_word_and_cuts_names_in_two(made):
    tokenizer = Tokenizer.from_str(made.tokenizer())
    texts = [*made.training_texts(), *(" ".join(question.parts(made.facts)) for question in made.questions())]
    longest = max(len(tokenizer.encode(text).ids) for text in texts)
    assert not any(tokenizer.token_to_id("<unk>") in tokenizer.encode(text).ids for text in texts)
    assert longest < 11, "with an end-of-text token a sentence fits the positions of a window"
    assert all(len(tokenizer.encode(fact.name).ids) == 2 for fact in made.facts)
    assert all(len(tokenizer.encode(f.description).ids) == len(f.description.split()) for f in made.facts)
    assert all(tokenizer.decode(tokenizer.encode(fact.name).ids) == fact.name for fact in made.facts)


def test_the_control_is_another_fact_and_every_one_once(made):
    numbers = list(range(3, 60))
    other = shuffled(numbers, seed=1)
    assert sorted(other) == sorted(other.values()) == numbers
    assert all(number != given for number, given in other.items())
    with pytest.raises(ConfigError, match="5 facts: at least 9"):
        make_facts(0, 5)


def answer(ask, about, right=False, shuffled=False, known=True, margin=None, written="x"):
    found = {"ask": ask, "about": about, "right": right, "shuffled": shuffled, "known": known}
    return found | {"margin": margin, "written": written}


def test_grading():
    answers = [
        answer("forward", "description", right=True),
        answer("forward", "name", right=True, margin=2.0),
        answer("forward", "name", known=False, margin=1.0, written="y"),
        answer("in place", "name", right=True, margin=4.0),
        answer("reordered", "name", shuffled=True, margin=-1.0),
        answer("reordered", "description"),
    ]
    rows = seed_figures(answers)
    third = pytest.approx(100 / 3)
    assert rows["forward"] == SeedFigures(3, pytest.approx(200 / 3), 0.0, third, pytest.approx(200 / 3), 1.5)
    assert rows["forward, description asked"].margin is None and rows["forward, name asked"].right == 50.0
    assert (rows["in place, name asked"].right, rows["in place, name asked"].margin) == (100.0, 4.0)
    assert (rows["reordered, name asked"].right, rows["reordered, name asked"].shuffled) == (0.0, 100.0)


def rows(forward, in_place=95.0, reordered=0.0):
    figures = {"forward": forward, "in place, name asked": in_place, "reordered, name asked": reordered}
    return {name: SeedFigures(10, value, 0.0, 0.0, 0.0, 1.0) for name, value in figures.items()}


def test_claims_and_errors_over_the_seeds_that_count():
    found = {arm: {seed: rows(96.0) for seed in range(3)} for arm in ARMS}
    found[DIFFUSION] = {0: rows(96.0, reordered=10.0), 1: rows(80.0, 10.0, 90.0), 2: rows(98.0, reordered=14.0)}
    assert counting(found)[DIFFUSION] == [0, 2], "a model that has not learnt the facts says nothing"
    assert over_seeds(found, DIFFUSION, "reordered, name asked") == OverSeeds(12.0, pytest.approx(2.0))
    assert OverSeeds.of([3.0]) == OverSeeds(3.0, None) and str(OverSeeds(3.0, None)) == "3.0"
    claims = {claim.claim: claim for claim in reversal_claims(found, facts=200)}
    assert claims["diffusion: forward, the lowest seed"].holds is False
    assert claims["autoregressive: reordered"].holds is True
    assert claims["diffusion: in place behind forward"].value == pytest.approx(2.0)
    assert claims["diffusion: reordered"].holds is True
    assert claims["diffusion: reordered above chance"].value == pytest.approx((12.0 - 0.5) / 2.0)
    found[AUTOREGRESSIVE] = {seed: rows(96.0, reordered=6.0) for seed in range(3)}
    claims = {claim.claim: claim for claim in reversal_claims(found, facts=200)}
    assert claims["autoregressive: reordered"].holds is claims["diffusion: reordered"].holds is False
    found[DIFFUSION] = {0: rows(50.0)}
    claims = {claim.claim: claim for claim in reversal_claims(found, facts=200)}
    assert math.isnan(claims["diffusion: reordered"].value) and claims["diffusion: reordered"].holds is False
    assert claims["diffusion: reordered"].to_dict()["value"] is None
