"""Deleting and inserting: single steps, whole blocks against a plain loop, and that it ends."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.sampling.editors import Levenshtein, NoEditor, never_written
from llada_megatron.llada_moe.sampling.schedules import FixedSteps, Threshold
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor, Reader, Statistics
from llada_megatron.llada_moe.sampling.token_buffer import LogitRows, Request, continuation, infilling
from tests.llada_moe.sampling.editors.rows import DELETE, INSERT, MASK, method, probabilities, says
from tests.llada_moe.sampling.toy import Logits, bidirectional, write

EDITOR = Levenshtein(delete_id=DELETE, insert_id=INSERT)


def answers(*script: list[int]) -> Logits:
    """A model that says one text after the other, whatever it sees; the last one for good."""
    left = list(script)

    def logits(tokens: Tensor) -> Tensor:
        return says(left.pop(0) if len(left) > 1 else left[0])

    return logits


def states(request: Request, logits: Logits, editor: Levenshtein = EDITOR) -> list[list[int]]:
    """What the model is shown in each pass, and the result."""
    finished, toy, _ = write([request], method(Threshold(0.5), editor), logits)
    return [shown[0] for shown in toy.shown] + [finished[0].tokens]


def test_delete_moves_the_rest_left_and_a_mask_comes_in():
    first, second, third = [5, 6, 7, 8], [5, DELETE, 7, 8], [5, 7, 8, 9]
    assert states(continuation([4], 4, None), answers([4, *first], [4, *second], [4, *third])) == [
        [4, MASK, MASK, MASK, MASK],
        [4, *first],
        [4, 5, 7, 8, MASK],
        [4, *third],
        [4, *third],
    ]


def test_insert_puts_a_mask_before_a_token_and_the_last_one_is_lost():
    first, second, third = [5, 7, 8, 9], [5, INSERT, 8, 9], [5, 6, 7, 8]
    assert states(continuation([4], 4, None), answers([4, *first], [4, *second], [4, *third])) == [
        [4, MASK, MASK, MASK, MASK],
        [4, *first],
        [4, 5, MASK, 7, 8],
        [4, *third],
        [4, *third],
    ]


def test_several_operations_of_one_step_are_carried_out_together():
    first, second, third = [5, 6, 7, 9, 9], [5, DELETE, 7, INSERT, 10], [5, 7, 8, 9, 10]
    shown = states(continuation([], 5, None), answers(first, second, third))
    assert shown[2:] == [[5, 7, MASK, 9, 10], third, third]


def test_a_mask_can_be_deleted_or_doubled():
    assert states(continuation([], 4, None), answers([5, DELETE, 7, 8], [5, 7, 8, 9]))[1] == [5, 7, 8, MASK]
    assert states(continuation([], 4, None), answers([5, INSERT, 7, 8], [5, 6, 6, 7]))[1] == [5, MASK, MASK, 7]


def test_given_tokens_neither_change_nor_move():
    tokens, gaps = [4, 0, 0, 9, 0, 0, 0, 10], [False, True, True, False, True, True, True, False]
    first = [DELETE, 5, 6, INSERT, 7, 8, 9, DELETE]
    second = [DELETE, DELETE, 6, DELETE, INSERT, 8, 9, INSERT]
    third = [DELETE, 6, 11, DELETE, 12, 7, 8, INSERT]
    shown = states(infilling(tokens, gaps, None), answers(first, second, third))
    assert shown[1:] == [
        [4, 5, 6, 9, 7, 8, 9, 10],
        [4, 6, MASK, 9, MASK, 7, 8, 10],
        [4, 6, 11, 9, 12, 7, 8, 10],
        [4, 6, 11, 9, 12, 7, 8, 10],
    ]


@pytest.mark.parametrize(("threshold", "written"), [(0.5, 6), (0.49, 9)])
def test_a_change_is_more_probable_than_the_threshold_and_not_just_as_probable(threshold, written):
    def logits(tokens):
        rows = says([5, 6, 7, 8], 100.0)
        if not (tokens == MASK).any():
            rows[1] = -1e4
            rows[1, [9, 10]] = 0.0  # one half each
        return rows

    editor = Levenshtein(threshold, delete_id=DELETE, insert_id=INSERT)
    assert states(continuation([], 4, None), logits, editor)[-1] == [5, written, 7, 8]


def test_the_step_after_the_budget_writes_text_only():
    """A model that always inserts: its second choice ends the block."""

    def logits(tokens):
        rows = says([INSERT] * 4)
        rows[:, 9] = 4.0
        return rows

    finished, _, _ = write([continuation([4], 3, None)], method(Threshold(0.5), EDITOR), logits)
    assert finished[0].tokens == [4, 9, 9, 9]
    for budget in (0, 1, 2):
        editor = Levenshtein(0.0, budget, DELETE, INSERT)
        finished, _, _ = write([continuation([4], 3, None)], method(Threshold(0.5), editor), logits)
        assert finished[0].tokens == [4, 9, 9, 9] and finished[0].passes <= 1 + budget + 1


def test_a_deletion_and_an_insertion_that_chase_each_other_are_stopped_before_the_budget():
    def logits(tokens):
        if (tokens == MASK).any():
            return says([5, 6, 7, 8])
        return says([5, DELETE if tokens[1] == 6 else 6, 7, 8])

    finished, _, _ = write([continuation([], 4, None)], method(Threshold(0.5), EDITOR), logits)
    assert finished[0].tokens == [5, 6, 7, 8] and finished[0].passes < 8


def test_a_state_is_known_again_however_wide_the_batch_was():
    def logits(tokens):
        if len(tokens) > 4:
            return says([9] * len(tokens))
        if (tokens == MASK).any():
            return says([5, 6, 7, 8])
        return says([5, DELETE if tokens[1] == 6 else 6, 7, 8])

    chased, wider = continuation([], 4, None), continuation([], 8, None, 1)
    how = method(Threshold(0.5), EDITOR)
    alone, together = write([chased], how, logits)[0], write([chased, wider], how, logits)[0]
    assert together[1].passes < alone[0].passes == together[0].passes


def test_while_first_masks_are_left_a_step_commits_more_than_came_in():
    def logits(tokens):
        begins = int((tokens == MASK).sum()) == 8
        rows = says([5, INSERT if begins else 6, 7, 8, 9, 10, 11, 12], 1.0) / torch.arange(1, 9)[:, None]
        rows[:2] *= 9 if begins else 1  # of the others the schedule takes one at a time, from the left
        return rows

    _, toy, _ = write([continuation([], 8, None)], method(Threshold(0.5), EDITOR), logits)
    masks = [shown[0].count(MASK) for shown in toy.shown]
    assert masks[:3] == [8, 7, 4]  # one written, one doubled, one lost at the end; then two that came in, and one more
    assert masks[3:7] == [3, 2, 1, 0]


def test_operations_are_text_to_nobody_else():
    text = [5, DELETE, INSERT, 8]

    def logits(tokens):
        rows = says(text)
        rows[:, 9] = 4.0
        return rows

    finished, _, _ = write([continuation([], 4, None)], method(FixedSteps(), NoEditor()), logits)
    assert finished[0].tokens == [5, 9, 9, 8]
    model = load_model("llada2.2-mini")
    assert never_written(model, NoEditor()) == (156895, 156930, 156931)
    assert never_written(model, Levenshtein(delete_id=156930, insert_id=156931)) == (156895,)
    assert never_written(load_model("llada2-mini"), NoEditor()) == (156895,)


def test_a_model_without_operations_is_refused():
    with pytest.raises(ConfigError, match="delete_token_id and insert_token_id.*LLaDA2.2"):
        Levenshtein().start(1, 4)


def plainly(request: Request, logits: Logits, threshold: float, editor: Levenshtein) -> tuple[list[int], int]:
    """LLaDA2.2's loop over one block after another: tokens, and forward passes."""
    cells = [(MASK, True) if gap else (token, False) for token, gap in zip(request.tokens, request.gaps, strict=True)]
    passes = 0
    for start, end in request.blocks:
        first = {i for i in range(start, end) if cells[i][1]}
        seen, post, done = Counter(), 0, False
        while not done:
            passes += 1
            tokens = [token for token, _ in cells]
            p, choice = probabilities(logits, tokens, (MASK,)).max(-1)
            text = probabilities(logits, tokens).argmax(-1)
            masks = [i for i in range(start, end) if cells[i][1]]
            last = not first and post >= editor.max_post_steps
            post += not first
            ranked = sorted(masks, key=lambda i: (-float(p[i]), i))
            taken = [i for i in masks if p[i] >= threshold] or ranked[:1]
            least = len(masks) - len(first) + 1 if first else len(masks)
            if len(taken) < least:
                taken = sorted({*taken, *ranked[:least]})
            written = {i: int(choice[i]) for i in taken}
            for i in range(start, end):
                sure = request.gaps[i] and not cells[i][1] and p[i] > editor.edit_threshold
                if sure and int(choice[i]) != cells[i][0]:
                    written[i] = int(choice[i])
            changes = [i for i in written if not cells[i][1] or written[i] in (DELETE, INSERT)]
            state = tuple(tokens[start:end])
            drop = sorted(sorted(changes), key=lambda i: float(p[i]))[: seen[state]]
            if last:
                drop = [i for i in changes if written[i] in (DELETE, INSERT)]
            else:
                seen[state] += 1
            for i in drop:
                if cells[i][1]:
                    written[i] = int(text[i])
                else:
                    del written[i]
            kept = set()
            for is_gap, run in groupby(range(start, end), key=lambda i: request.gaps[i]):
                places, new = list(run), []
                for i in places if is_gap else []:
                    if written.get(i) == INSERT:
                        new += [((MASK, True), False), (cells[i], False)]
                    elif i not in written:
                        new.append((cells[i], i in first))
                    elif written[i] != DELETE:
                        new.append(((written[i], False), False))
                new += [((MASK, True), False)] * len(places)
                for i, (cell, is_first) in zip(places if is_gap else [], new, strict=False):
                    cells[i] = cell
                    kept |= {i} if is_first else set()
            first = kept
            done = not any(is_open for _, is_open in cells[start:end]) and (last or not written)
    return [token for token, _ in cells], passes


@settings(derandomize=True, deadline=None, max_examples=80)
@given(
    rows=st.lists(
        st.lists(st.tuples(st.integers(4, 13), st.booleans()), min_size=1, max_size=14).filter(
            lambda row: any(gap for _, gap in row)
        ),
        min_size=1,
        max_size=3,
    ),
    block=st.one_of(st.none(), st.integers(1, 8)),
    threshold=st.sampled_from([0.2, 0.5]),
    edit_threshold=st.sampled_from([0.0, 0.3, 0.7]),
    max_post_steps=st.integers(0, 6),
    seed=st.integers(0, 100),
)
def test_as_the_plain_loop(rows, block, threshold, edit_threshold, max_post_steps, seed):
    editor = Levenshtein(edit_threshold, max_post_steps, DELETE, INSERT)
    requests = [infilling([t for t, _ in row], [g for _, g in row], block, i) for i, row in enumerate(rows)]
    finished, _, _ = write(requests, method(Threshold(threshold), editor), bidirectional(seed))
    for request, row in zip(requests, finished, strict=True):
        assert (row.tokens, row.passes) == plainly(request, bidirectional(seed), threshold, editor)
        assert not {DELETE, INSERT, MASK} & set(row.tokens)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_second_choice_is_read_from_shards_as_from_the_whole(temperature):
    logits = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    logits[:25, DELETE] = 9.0
    rows = LogitRows(*[torch.arange(50)] * 5)
    processor = LogitsProcessor(frozenset({"text", "entropy"}), [MASK], [DELETE, INSERT], temperature)
    whole = Reader(processor, 0, lambda packet: packet[None]).read(logits, rows)
    plain = LogitsProcessor(frozenset(), [MASK, DELETE, INSERT], (), temperature)
    assert torch.equal(whole.text, Reader(plain, 0, lambda packet: packet[None]).read(logits, rows).token)
    packets: list[Tensor] = []
    for first in (0, 4, 8, 12):
        reader = Reader(processor, first, lambda packet: packets.append(packet) or packet[None])
        reader.read(logits[:, first : first + 4], rows)
        assert reader.packet_bytes <= 64
    together = Reader(processor, 0, lambda packet: torch.stack(packets[:4])).read(logits[:, :4], rows)
    assert torch.equal(together.text, whole.text) and torch.equal(together.token, whole.token)
    again = Statistics.unpacked(whole.packed(), processor.needs)
    assert torch.equal(again.text, whole.text) and again.text.dtype == torch.int64 and again.current is None
