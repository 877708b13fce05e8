from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.sampling.loop import Method, SequenceGroup
from llada_megatron.llada_moe.sampling.schedules import FixedSteps, Threshold
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor
from llada_megatron.llada_moe.sampling.token_buffer import continuation, infilling
from tests.llada_moe.sampling.toy import EOS, MASK, VOCAB, Toy, bidirectional, write

PROCESSOR = LogitsProcessor(excluded=[MASK], seed=5)


def rows_with_gaps() -> st.SearchStrategy:
    token = st.integers(0, VOCAB - 1)
    row = st.lists(st.tuples(token, st.booleans()), min_size=1, max_size=20).filter(lambda row: any(g for _, g in row))
    return st.lists(row, min_size=1, max_size=5)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    rows=rows_with_gaps(),
    block=st.one_of(st.none(), st.integers(1, 8)),
    schedule=st.sampled_from([FixedSteps(), FixedSteps(3), FixedSteps(7, "random", 5), Threshold(0.4)]),
    temperature=st.sampled_from([0.0, 0.7]),
    slots=st.integers(1, 5),
)
def test_fills_the_gaps_touches_nothing_else_and_each_row_is_as_alone(rows, block, schedule, temperature, slots):
    method = Method(schedule, logits_processor=LogitsProcessor(excluded=[MASK], temperature=temperature, seed=5))
    requests = [infilling([t for t, _ in row], [g for _, g in row], block, i) for i, row in enumerate(rows)]
    together, _, _ = write(requests, method, slots=slots)
    assert [finished.stream for finished in together] == list(range(len(rows)))
    for request, finished in zip(requests, together, strict=True):
        alone, _, _ = write([request], method)
        assert finished == alone[0]
        for before, after, is_gap in zip(request.tokens, finished.tokens, request.gaps, strict=True):
            assert (after != MASK) if is_gap else (after == before)


@pytest.mark.parametrize(("steps", "expected"), [(12, [1] * 12), (6, [2] * 6), (5, [2, 2, 2, 3, 3]), (1, [6, 6])])
def test_commits_the_even_share_of_each_step(steps, expected):
    finished, toy, _ = write([continuation([5, 6, 7], 12, 6)], Method(FixedSteps(steps), logits_processor=PROCESSOR))
    masks = [shown[0].count(MASK) for shown in toy.shown] + [0]
    assert [a - b for a, b in pairwise(masks)] == expected
    assert finished[0].passes == len(expected)


def test_the_first_steps_take_one_more():
    _, toy, _ = write([continuation([5], 7, None)], Method(FixedSteps(3), logits_processor=PROCESSOR))
    assert [shown[0].count(MASK) for shown in toy.shown] == [7, 4, 2]


def test_blocks_are_written_in_order_and_only_their_masks_are_asked_for():
    _, toy, _ = write([continuation([5, 6], 8, 4)], Method(FixedSteps(8), logits_processor=PROCESSOR))
    for shown, wanted in zip(toy.shown[:4], toy.wanted[:4], strict=True):
        assert shown[0][6:] == [MASK] * 4
        assert wanted[0] == [i for i in range(2, 6) if shown[0][i] == MASK]
    assert MASK not in toy.shown[4][0][:6]


def test_low_confidence_keeps_the_most_confident():
    def logits(tokens):
        return torch.arange(len(tokens), dtype=torch.float32)[:, None] * torch.eye(VOCAB)[7]

    finished, toy, _ = write([continuation([5], 4, None)], Method(logits_processor=PROCESSOR), logits)
    assert [wanted[0] for wanted in toy.wanted] == [[1, 2, 3, 4], [1, 2, 3], [1, 2], [1]]
    assert finished[0].tokens == [5, 7, 7, 7, 7]


def test_seed_determines_the_sample_and_another_seed_draws_another():
    def text(seed: int) -> list[list[int]]:
        method = Method(
            FixedSteps(5, "random", seed), logits_processor=LogitsProcessor(excluded=[MASK], temperature=3.0, seed=seed)
        )
        finished, _, _ = write([continuation([5, 6], 10, None, 0), continuation([9], 10, None, 1)], method)
        return [row.tokens for row in finished]

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_temperature_draws_from_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, 9.0])  # the last one is the mask and excluded
    method = Method(FixedSteps(1), logits_processor=LogitsProcessor(excluded=[MASK], temperature=2.0))
    requests = [continuation([0], 1, None, i) for i in range(4000)]
    finished, _, _ = write(requests, method, lambda tokens: logits.expand(len(tokens), -1), slots=500)
    share = torch.bincount(torch.tensor([row.tokens[1] for row in finished]), minlength=4) / 4000
    torch.testing.assert_close(share[:3], (logits[:3] / 2).softmax(0), atol=0.03, rtol=0)
    assert share[3] == 0


def test_stops_at_end_of_text_once_nothing_before_it_is_open():
    def logits(tokens):
        rows = torch.zeros(len(tokens), VOCAB)
        rows[2, EOS] = 5.0  # position 2 is the first to be committed, before position 1
        rows[1, 9] = 3.0
        rows[3:, 8] = 1.0
        return rows

    method = Method(FixedSteps(6), logits_processor=PROCESSOR, stop_id=EOS)
    finished, _, _ = write([continuation([5], 6, 3)], method, logits)
    assert finished[0].tokens == [5, 9, EOS, EOS, EOS, EOS, EOS]
    assert finished[0].passes == 2


def test_an_end_of_text_in_the_prompt_does_not_stop():
    method = Method(logits_processor=LogitsProcessor(excluded=[MASK, EOS]), stop_id=EOS)
    finished, _, _ = write([continuation([EOS, 5], 4, None)], method)
    assert EOS not in finished[0].tokens[2:] and finished[0].passes == 4


def test_a_mask_token_in_the_prompt_is_text():
    finished, toy, _ = write([continuation([MASK, 5, MASK], 4, None)], Method(logits_processor=PROCESSOR))
    assert finished[0].tokens[:3] == [MASK, 5, MASK]
    assert toy.wanted[0][0] == [3, 4, 5, 6]
    assert MASK not in finished[0].tokens[3:]


def test_guidance_moves_away_from_the_unconditional_prediction():
    def logits(tokens):
        rows = torch.zeros(len(tokens), VOCAB)
        rows[:, 8] = 1.0
        rows[:, 9] = 0.9 * float(tokens[0] == 5)
        return rows

    for guidance, token in ((0.0, 8), (1.0, 9)):
        method = Method(FixedSteps(1), logits_processor=LogitsProcessor(excluded=[MASK], guidance=guidance))
        finished, _, _ = write([continuation([5], 2, None)], method, logits)
        assert finished[0].tokens[1:] == [token, token]


def test_a_slot_is_filled_again_as_soon_as_it_is_free():
    requests = [continuation([5], new, None, i) for i, new in enumerate([2, 9, 3, 4])]
    _, toy, steps = write(requests, Method(logits_processor=PROCESSOR), slots=2)
    assert [len(shown) for shown in toy.shown] == [2] * 9
    assert [[done.stream for done in step.finished] for step in steps] == [[], [0], [], [], [2], [], [], [], [3, 1]]


def test_steps_tell_what_changed():
    _, toy, steps = write([continuation([5, 6], 6, 3)], Method(FixedSteps(4), logits_processor=PROCESSOR))
    tokens = toy.shown[0][0]
    for step, after in zip(steps, [*toy.shown[1:], None], strict=True):
        row, column = step.changed.nonzero(as_tuple=True)
        positions, written = step.block.first[row] + column, step.revision.tokens[row, column]
        for position, token in zip(positions.tolist(), written.tolist(), strict=True):
            tokens[position] = token
        assert after is None or tokens == after[0]


def test_a_request_without_a_gap_is_refused():
    group = SequenceGroup(Method(logits_processor=PROCESSOR), 1, 4, 1, MASK)
    with pytest.raises(ValueError, match="without a gap"):
        group.admit(0, infilling([5, MASK], [False, False], None))


def test_statistics_need_a_plan():
    group = SequenceGroup(Method(logits_processor=PROCESSOR), 1, 4, 1, MASK)
    group.admit(0, continuation([5], 3, None))
    work = group.plan()
    statistics = Toy(bidirectional(), PROCESSOR)(work)
    group.apply(statistics)
    with pytest.raises(RuntimeError, match="no planned pass"):
        group.apply(statistics)


@pytest.mark.parametrize(("guidance", "copies"), [(0.0, 1), (0.5, 2)])
def test_counts_what_a_sequence_took(guidance, copies):
    method = Method(logits_processor=LogitsProcessor(excluded=[MASK], guidance=guidance))
    finished, _, _ = write([continuation([5] * 3, new, None, i) for i, new in enumerate([2, 4])], method)
    assert [row.passes for row in finished] == [2, 4]
    assert [row.positions_run for row in finished] == [2 * 5 * copies, 4 * 7 * copies]
    assert [row.rows_read for row in finished] == [2 + 1, 4 + 3 + 2 + 1]
