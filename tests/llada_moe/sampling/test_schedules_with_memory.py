"""Schedules that remember: beside the published loops, and over sequences that follow each other in a slot."""

from __future__ import annotations

import math
from collections.abc import Generator

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.sampling.loop import Method
from llada_megatron.llada_moe.sampling.schedules import CreditThreshold, SlowFast, Stable
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor
from llada_megatron.llada_moe.sampling.token_buffer import continuation, infilling
from tests.llada_moe.sampling.blocks import make_block, make_statistics
from tests.llada_moe.sampling.toy import EOS, MASK, VOCAB, bidirectional, write

Published = Generator[int | set[int] | None, list[float] | None, None]
"""Says how far the model may look, is given confidences, says what it commits, and so on."""


def slowfast(length: int) -> Published:
    """One block of the published loop, phase by phase."""
    masks, last = set(range(length)), 0

    def commits(conf: list[float], low: int, high: int) -> set[int]:
        scope = sorted(i for i in masks if low <= i < high)
        sure = {i for i in scope if conf[i] >= 0.9}
        chosen = sure if len(sure) > 1 else {max(scope, key=lambda i: (conf[i], -i))}
        masks.difference_update(chosen)
        return chosen

    while masks:
        guesses: list[int] = []
        end, found = last, False
        for _ in range(6):
            if not masks:
                return
            conf = yield None
            if not found:
                far = [i for i in masks if i >= last and conf[i] >= 0.3]
                guesses.append(max(far) + 1 if far else last + 1)
                found = len(guesses) >= 2 and numpy.std(guesses[-2:]) < 1
                end = guesses[-1] if found else int(numpy.mean(guesses[-2:]))
            yield commits(conf, last, length)
        first = True
        while any(last <= i < end for i in masks):
            conf = yield None if first else end
            first = False
            yield commits(conf, last, end)
        last = end


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(1, 14), st.integers(0, 9), st.integers(0, 2**32 - 1), st.floats(0.3, 4)),
        min_size=1,
        max_size=4,
    )
)
def test_slowfast_is_the_published_loop(blocks):
    """Blocks follow each other in one slot."""
    running = SlowFast().start(2, 64)
    taken = 0
    for length, start, seed, power in blocks:
        random = numpy.random.default_rng(seed)
        masked, published = [True] * length, slowfast(length)
        for step in range(length):
            block = make_block([masked], start=start, step=[taken], step_in_block=[step], slots=[1], behind=7)
            limit = next(published)
            reach = running.reach(block)
            assert reach.tolist() == [start + length + 7 if limit is None else start + limit]
            confidence = random.random(length) ** power
            if limit is not None:
                confidence[limit:] = 0.0  # not asked for
            confidence = [float(numpy.float32(value)) for value in confidence]
            chosen = running.select(make_statistics([confidence]), block)
            assert set(chosen[0].nonzero().flatten().tolist()) == published.send(confidence)
            masked = [m and not bool(c) for m, c in zip(masked, chosen[0], strict=True)]
            taken += 1
            if not any(masked):
                break
        assert not any(masked)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(length=st.integers(1, 10), history=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_stable_commits_what_was_calm_and_sure(length, history, seed):
    random = numpy.random.default_rng(seed)
    running = Stable(0.5, 0.01, history).start(3, 16)
    for start in (0, 16 - length):  # the second block runs up to the last position
        masked, followed = [True] * length, []
        for step in range(length):
            confidence = random.random(length).astype(numpy.float32).tolist()
            followed.append((random.random(length) * 0.015).tolist() if step else [math.inf] * length)
            block = make_block([masked], start=start, step=step, slots=[2])
            chosen = running.select(make_statistics([confidence], divergence=[followed[-1]]), block)[0].tolist()
            masks = [i for i in range(length) if masked[i]]
            ready = {
                i
                for i in masks
                if confidence[i] > 0.5
                and len(followed) >= history
                and all(numpy.float32(change[i]) < numpy.float32(0.01) for change in followed[-history:])
            }
            assert {i for i in range(length) if chosen[i]} == (ready or {max(masks, key=lambda i: confidence[i])})
            masked = [m and not c for m, c in zip(masked, chosen, strict=True)]
            if not any(masked):
                break


RULES = [SlowFast(3, 0.1, 0.4), Stable(0.2, 0.2, 1), CreditThreshold(0.5, 2.0)]
SHARPNESS = 0.35
"""Of the toy's logits: a model that is sure at some places only."""


@pytest.mark.parametrize("schedule", RULES, ids=lambda rule: type(rule).__name__)
@settings(derandomize=True, deadline=None, max_examples=25)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(0, VOCAB - 1), st.booleans()), min_size=1, max_size=20).filter(
            lambda row: any(gap for _, gap in row)
        ),
        min_size=1,
        max_size=5,
    ),
    block=st.none() | st.integers(2, 8),
    slots=st.integers(1, 3),
    temperature=st.sampled_from([0.0, 0.7]),
)
def test_a_sequence_is_written_as_if_it_were_alone(schedule, rows, block, slots, temperature):
    processor = LogitsProcessor(frozenset(schedule.needs), [MASK], temperature=temperature, seed=5)
    method = Method(schedule, logits_processor=processor)
    requests = [infilling([t for t, _ in row], [gap for _, gap in row], block, i) for i, row in enumerate(rows)]
    logits = bidirectional(1, SHARPNESS)
    together, _, _ = write(requests, method, logits, slots)
    for request, finished in zip(requests, together, strict=True):
        assert write([request], method, logits)[0] == [finished]


@pytest.mark.parametrize("schedule", RULES, ids=lambda rule: type(rule).__name__)
def test_the_toy_makes_the_rules_work(schedule):
    """Else the test above would say little."""
    processor = LogitsProcessor(frozenset(schedule.needs), [MASK, EOS])
    runs = [
        write(
            [continuation([5, 6], 16, None)],
            Method(schedule, logits_processor=processor),
            bidirectional(seed, SHARPNESS),
        )
        for seed in range(8)
    ]
    assert len({finished[0].passes for finished, _, _ in runs}) > 2
    assert max(finished[0].passes for finished, _, _ in runs) <= 16


def test_slowfast_cuts_the_text_behind_its_cycle_off():
    _, toy, _ = write(
        [continuation([5, 6], 16, None)],
        Method(SlowFast(3, 0.2, 0.9), logits_processor=LogitsProcessor(excluded=[MASK, EOS])),
        bidirectional(4, 0.2),
    )
    widths = [len(shown[0]) for shown in toy.shown]
    assert widths[:4] == [18] * 4  # the slow phase, and the first fast step
    assert min(widths) < 18


def test_credit_speeds_up_what_the_model_keeps_to():
    """Logits that never change: the likeliest token passes the threshold by credit alone."""
    table = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(0)) * 0.2

    def passes(alpha: float) -> int:
        schedule = CreditThreshold(0.5, alpha, 0.9, 0.2)
        method = Method(schedule, logits_processor=LogitsProcessor(frozenset(schedule.needs), [MASK]))
        return write([continuation([5], 16, None)], method, lambda tokens: table[: len(tokens)])[0][0].passes

    assert passes(0.0) == 16
    assert passes(3.0) < 10
