"""Statistics read from shards of the vocabulary, beside those of whole distributions in float64."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.sampling import draws, statistics
from llada_megatron.llada_moe.sampling.published import EDITORS, SCHEDULES
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor, Statistics
from llada_megatron.llada_moe.sampling.step_cache import Credit, CreditAccount
from tests.llada_moe.sampling.shards import Shards, make_rows

VOCAB = 24
ALL = frozenset({"entropy", "current", "text", "divergence"})
CREDIT = Credit(0.7, 0.8, 0.2)


@st.composite
def processors(draw):
    """Readings, how the vocabulary is cut, and logits of several steps: of few values, so that many are equal."""
    cuts = draw(st.lists(st.integers(1, VOCAB - 1), max_size=4, unique=True).map(sorted))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, VOCAB], strict=True)]
    start = draw(st.integers(0, VOCAB - 2))
    excluded = list(range(start, draw(st.integers(start, VOCAB - 2))))  # often a whole shard
    processor = LogitsProcessor(
        needs=ALL | draw(st.sampled_from([frozenset(), frozenset({CREDIT})])),
        excluded=excluded,
        operations=[VOCAB - 1] if VOCAB - 2 not in excluded else [],
        temperature=draw(st.sampled_from([0.0, 0.5, 2.0])),
        guidance=draw(st.sampled_from([0.0, 1.5])),
        seed=draw(st.integers(0, 3)),
    )
    steps, rows = draw(st.integers(1, 3)), draw(st.integers(0, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    grid = torch.randint(-6, 7, (steps, rows * (2 if processor.guidance else 1), VOCAB), generator=generator)
    return processor, sizes, grid * draw(st.sampled_from([0.0, 0.25, 1.0, 5.0]))


def excluded_from(logits: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return logits.index_fill(1, torch.tensor(ids, dtype=torch.int64), -torch.inf)


@settings(derandomize=True, deadline=None, max_examples=120)
@given(processors())
def test_any_number_of_shards_is_one_shard(case):
    processor, sizes, logits = case
    many, one = Shards(processor, sizes), Shards(processor, [VOCAB])
    for step, values in enumerate(logits.float()):
        rows = make_rows(len(values) // (2 if processor.guidance else 1), step)
        [whole] = one.read(values, rows)
        seen = many.read(values, rows)
        assert len(seen) == len(sizes)
        for shard in seen:
            assert torch.equal(shard.token, whole.token)
            assert torch.equal(shard.text, whole.text)
            for name in ("confidence", "entropy", "current", "divergence"):
                torch.testing.assert_close(getattr(shard, name), getattr(whole, name), atol=2e-5, rtol=2e-5)
            for field in fields(Statistics):
                assert torch.equal(getattr(shard, field.name), getattr(seen[0], field.name))  # to the bit


@settings(derandomize=True, deadline=None, max_examples=120)
@given(processors().filter(lambda case: case[0].temperature == 0.0))
def test_they_are_those_of_the_whole_distribution(case):
    processor, sizes, logits = case
    processor = replace(processor, guidance=0.0, needs=processor.needs - {CREDIT})
    shards, before = Shards(processor, sizes), None
    for step, values in enumerate(logits.double()):
        current = [(7 * i) % VOCAB for i in range(len(values))]
        found = shards.read(values.float(), make_rows(len(values), step, current))[0]
        allowed = excluded_from(values, processor.excluded)
        chances = allowed.softmax(-1)
        logs = allowed.log_softmax(-1).clamp(min=-1e9)
        close = {"atol": 1e-5, "rtol": 1e-5}
        assert torch.equal(found.token, allowed.argmax(-1))
        assert torch.equal(found.text, excluded_from(allowed, processor.operations).argmax(-1))
        torch.testing.assert_close(found.confidence.double(), chances.amax(-1), **close)
        torch.testing.assert_close(found.entropy.double(), -(chances * logs).sum(-1), **close)
        there = chances.gather(1, torch.tensor(current, dtype=torch.int64)[:, None])[:, 0]
        torch.testing.assert_close(found.current.double(), there, **close)
        if before is None:
            assert torch.isinf(found.divergence).all()
        else:
            change = (chances * (logs - before)).sum(-1)
            torch.testing.assert_close(found.divergence.double(), change, atol=5e-5, rtol=1e-5)
        before = logs


@settings(derandomize=True, deadline=None, max_examples=60)
@given(processors().filter(lambda case: case[0].temperature == 0.0))
def test_credit_is_that_of_a_whole_matrix(case):
    """The published rule keeps one number per position and token."""
    processor, sizes, logits = case
    processor = replace(processor, guidance=0.0, needs=frozenset({CREDIT}))
    shards = Shards(processor, sizes)
    matrix = torch.zeros(logits.shape[1:], dtype=torch.float64)
    for step, values in enumerate(logits.double()):
        found = shards.read(values.float(), make_rows(len(values), step))[0]
        allowed = excluded_from(values, processor.excluded)
        chances, likeliest = allowed.softmax(-1).max(-1)
        matrix *= CREDIT.beta
        matrix[torch.arange(len(values)), likeliest] += chances**CREDIT.gamma
        fused = (allowed + CREDIT.alpha * matrix.log1p()).softmax(-1)
        torch.testing.assert_close(found.confidence.double(), fused.amax(-1), atol=1e-5, rtol=1e-5)
        chosen = fused.gather(1, found.token[:, None])[:, 0]
        torch.testing.assert_close(chosen, fused.amax(-1), atol=1e-6, rtol=0)


def test_credit_keeps_one_number_for_a_token_that_gains_again_and_again():
    account, token = CreditAccount(CREDIT), torch.tensor([4, 5])
    for step in range(50):
        account.raised(torch.zeros(2, VOCAB), 0, make_rows(2, step), token + (step % 2), torch.full((2,), 0.5))
    _, (tokens, credits) = account._step_cache.recall(make_rows(2, 50))
    assert tokens.shape == credits.shape == (2, 2)


def test_a_sequence_without_numbers_takes_no_other_along():
    """What a broken model said of one sequence is nothing to the next one in its slot."""
    processor = LogitsProcessor(ALL | {CREDIT})
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    broken, rows = Shards(processor, [10, 14]), make_rows(2, 0)
    found = broken.read(torch.full((2, VOCAB), torch.nan), rows)[0]
    assert found.confidence.isnan().all() and ((found.token >= 0) & (found.token < VOCAB)).all()
    later = replace(rows, stream=rows.stream + 7)
    seen, fresh = broken.read(logits, later)[0], Shards(processor, [10, 14]).read(logits, later)[0]
    for field in fields(Statistics):
        assert torch.equal(getattr(seen, field.name), getattr(fresh, field.name))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    processors().filter(lambda case: case[2].shape[1] > 0),
    st.sampled_from([math.nan, math.inf, -math.inf]),
    st.integers(0, VOCAB - 1),
    st.integers(0, 3),
)
def test_one_logit_that_is_no_number_shows_in_its_row(case, value, column, row):
    """Of an excluded id too, in either half of guidance, on whatever shard it lies."""
    processor, sizes, logits = case
    values = logits[0].float().clone()
    rows = len(values) // (2 if processor.guidance else 1)
    assert all(seen.finite for seen in Shards(processor, sizes).read(values, make_rows(rows)))
    row %= len(values)
    values[row, column] = value
    for seen in Shards(processor, sizes).read(values, make_rows(rows)):
        assert not seen.finite and seen.confidence.isfinite().tolist() == [i != row % rows for i in range(rows)]
        assert not Statistics.unpacked(seen.packed(), processor.needs).finite


def test_entropy_of_a_large_vocabulary_is_right():
    logits = torch.randn(8, 157184, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 12, 8)[:, None]
    found = Shards(LogitsProcessor(frozenset({"entropy"})), [39296] * 4).read(logits, make_rows(8))[0]
    logs = logits.double().log_softmax(-1)
    torch.testing.assert_close(found.entropy.double(), -(logs.exp() * logs).sum(-1), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("at_once", [1, 50, 72, 10**6])
def test_noise_exists_for_some_rows_at_a_time(at_once, monkeypatch):
    logits = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(0))
    processor = LogitsProcessor(frozenset({"text"}), [3], [5], temperature=1.0)
    [expected] = Shards(processor, [VOCAB]).read(logits, make_rows(7))
    sizes, gumbel = [], draws.gumbel
    monkeypatch.setattr(statistics, "DRAWS_AT_ONCE", at_once)
    monkeypatch.setattr(draws, "gumbel", lambda *names: sizes.append((noise := gumbel(*names)).numel()) or noise)
    [found] = Shards(processor, [VOCAB]).read(logits, make_rows(7))
    for field in ("token", "confidence", "text"):
        assert torch.equal(getattr(found, field), getattr(expected, field))
    assert max(sizes) <= max(VOCAB, at_once) and sum(sizes) == 2 * logits.numel()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_packets_are_at_most_64_bytes(temperature):
    """All that can be asked for at once."""
    shards = Shards(LogitsProcessor(ALL | {CREDIT}, temperature=temperature), [12, 12])
    shards.read(torch.zeros(3, VOCAB), make_rows(3))
    assert [reader.packet_bytes for reader in shards.readers] == [60 if temperature else 44] * 2
    plain = Shards(LogitsProcessor(temperature=temperature), [12, 12])
    plain.read(torch.zeros(3, VOCAB), make_rows(3))
    assert plain.readers[0].packet_bytes == (24 if temperature else 12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("editor", EDITORS)
def test_of_any_method_at_most_64_bytes_of_a_row_leave_a_rank(schedule, editor):
    """Its packet to the other shards, and its statistics to the next pipeline stage."""
    needs = frozenset(SCHEDULES[schedule]().needs) | frozenset(EDITORS[editor]().needs)
    shards = Shards(LogitsProcessor(needs, temperature=1.0), [12, 12])
    shards.read(torch.zeros(3, VOCAB), make_rows(3))
    assert shards.readers[0].packet_bytes + 4 * Statistics.width(needs) <= 64


def test_what_a_sequence_left_in_a_slot_is_nobodys():
    processor = LogitsProcessor(frozenset({"divergence", CREDIT}))
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0))
    fresh = Shards(processor, [VOCAB])
    [expected] = fresh.read(logits, make_rows(4, 6))
    for stream, step in ((1, 5), (0, 4), (0, 6), (0, 0)):  # another sequence, or not the step before
        used = Shards(processor, [VOCAB])
        rows = make_rows(4, step)
        used.read(logits * 2, replace(rows, stream=rows.stream + stream))
        [found] = used.read(logits, make_rows(4, 6))
        assert torch.equal(found.divergence, expected.divergence)
        assert torch.equal(found.confidence, expected.confidence)
    used = Shards(processor, [VOCAB])
    used.read(logits * 2, make_rows(4, 5))
    [found] = used.read(logits, make_rows(4, 6))
    assert torch.isfinite(found.divergence).all()
    assert not torch.equal(found.confidence, expected.confidence)


def test_rows_are_found_again_in_any_order_and_number():
    shards = Shards(LogitsProcessor(frozenset({"divergence"})), [VOCAB])
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0))
    rows, later = make_rows(5), make_rows(5, 1)
    shards.read(logits, rows)
    order = torch.tensor([3, 0, 4])
    some = type(later)(*(getattr(later, field.name)[order] for field in fields(later)))
    [same] = shards.read(logits[order], some)
    torch.testing.assert_close(same.divergence, torch.zeros(3), atol=1e-6, rtol=0)
    [after] = shards.read(logits, make_rows(5, 2))
    assert [math.isinf(value) for value in after.divergence.tolist()] == [False, True, True, False, False]


@pytest.mark.parametrize("needs", [frozenset(), frozenset({"current"}), ALL, ALL | {CREDIT}])
def test_travel_to_another_rank_unchanged(needs):
    shards = Shards(LogitsProcessor(needs), [10, 14])
    found = shards.read(torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0)), make_rows(3))[0]
    packed = found.packed()
    assert packed.shape == (3, Statistics.width(needs))
    again = Statistics.unpacked(packed, needs)
    for field in fields(Statistics):
        value, expected = getattr(again, field.name), getattr(found, field.name)
        assert (value is None and expected is None) or torch.equal(value, expected)
