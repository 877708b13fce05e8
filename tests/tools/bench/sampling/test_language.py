"""The small language: its texts are right by its own judgement, and every kind of mistake is counted."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.tools.bench.sampling.language import OPEN, Language

LANGUAGE = Language()
SEEDS = st.integers(0, 10**9)


@given(SEEDS, st.integers(0, 40))
def test_a_text_of_the_language_is_right_and_ends(seed, padding):
    example = LANGUAGE.example(seed)
    score = LANGUAGE.score(example.prompt, example.response + [LANGUAGE.eos_id] * padding)
    assert (score.right, score.ends, score.tokens) == (1.0, True, len(example.response) - 1)
    assert LANGUAGE.example(seed) == example
    assert len(example.prompt) <= LANGUAGE.longest_prompt
    assert LANGUAGE.mask_id not in example.prompt + example.response


@given(SEEDS, st.data())
def test_a_wrong_token_makes_sentences_wrong(seed, data):
    example = LANGUAGE.example(seed)
    asked = (len(example.response) - 1) // LANGUAGE.sentence_length
    at = data.draw(st.integers(0, len(example.response) - 2))
    wrong = data.draw(st.sampled_from(LANGUAGE.sentence_tokens).filter(lambda word: word != example.response[at]))
    response = [*example.response[:at], wrong, *example.response[at + 1 :]]
    score = LANGUAGE.score(example.prompt, response)
    assert score.ends
    assert 1 - 2 / asked - 1e-9 <= score.right <= 1 - 1 / asked + 1e-9  # a wrong head may also make the next one wrong


@given(SEEDS)
def test_a_text_that_stops_early_or_late_does_not_end_where_it_should(seed):
    example, size = LANGUAGE.example(seed), LANGUAGE.sentence_length
    sentences, end = example.response[:-1], [LANGUAGE.eos_id]
    early = LANGUAGE.score(example.prompt, sentences[:-size] + end * 9)
    assert not early.ends and early.right == pytest.approx(1 - size / len(sentences))
    assert early.tokens == len(sentences) - size
    late = LANGUAGE.score(example.prompt, sentences + sentences[:size] + end)
    assert late.right == 1.0 and not late.ends
    assert not LANGUAGE.score(example.prompt, sentences).ends  # cut off: whether it would end is not known


def test_an_empty_response_and_a_prompt_of_another_kind():
    prompt = LANGUAGE.example(0).prompt
    assert LANGUAGE.score(prompt, []).right == 0.0
    with pytest.raises(ValueError, match="no number"):
        LANGUAGE.score(prompt[:-1], [])


def test_prompts_have_many_lengths():
    assert len({len(LANGUAGE.example(seed).prompt) for seed in range(100)}) > 20


def test_the_likeliest_tokens_of_an_open_sentence_need_not_make_one_that_exists():
    """Otherwise committing many positions at once could not go wrong, and quality would say nothing."""
    spoilt = 0
    for head in range(0, LANGUAGE.heads, 2):
        votes = [Counter() for _ in range(LANGUAGE.tail_length)]
        for successor, probability in zip(LANGUAGE.successors[head], OPEN, strict=True):
            for slot, token in enumerate(LANGUAGE.tails[successor]):
                votes[slot][token] += probability
        tail = [vote.most_common(1)[0][0] for vote in votes]
        spoilt += tail != LANGUAGE.tails[LANGUAGE.successors[head][0]]
    assert spoilt > LANGUAGE.heads / 6
