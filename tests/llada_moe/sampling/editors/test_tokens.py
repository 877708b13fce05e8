"""Token editing against a plain loop over one sequence, and what it is for: planted errors are repaired."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.sampling.editors import NoEditor, TokenEditing, trained_for_editing
from llada_megatron.llada_moe.sampling.schedules import FixedSteps, Threshold
from llada_megatron.llada_moe.sampling.token_buffer import Request, continuation
from tests.llada_moe.sampling.editors.rows import MASK, method, probabilities, says
from tests.llada_moe.sampling.toy import Logits, bidirectional, write

TEXT = [5, 6, 7, 8, 9, 10, 11, 12]
WRONG = 13


def plainly(request: Request, logits: Logits, threshold: float, editor: TokenEditing) -> tuple[list[int], int]:
    """LLaDA2.1's loop: tokens, and forward passes."""
    tokens = [MASK if gap else token for token, gap in zip(request.tokens, request.gaps, strict=True)]
    is_open, passes = list(request.gaps), 0
    for number, (_, end) in enumerate(request.blocks):
        first = request.blocks[max(0, number - editor.reach)][0]
        post = 0
        while True:
            p, choice = probabilities(logits, tokens).max(-1)
            passes += 1
            masks = [i for i in range(first, end) if is_open[i]]
            post += not masks
            take = [i for i in masks if p[i] >= threshold] or sorted(masks, key=lambda i: (-float(p[i]), i))[:1]
            edits = [
                i
                for i in range(first, end)
                if request.gaps[i] and not is_open[i] and choice[i] != tokens[i] and p[i] > editor.edit_threshold
            ]
            for i in take + edits:
                tokens[i], is_open[i] = int(choice[i]), False
            settled = not take + edits or post >= editor.max_post_steps
            if settled and not any(is_open[first:end]):
                break
    return tokens, passes


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    prompts=st.lists(st.lists(st.integers(4, 13), max_size=7), min_size=1, max_size=4),
    new=st.integers(1, 12),
    block=st.integers(1, 6),
    reach=st.integers(0, 2),
    threshold=st.sampled_from([0.3, 0.6]),
    edit_threshold=st.sampled_from([0.0, 0.3, 0.6]),
    max_post_steps=st.integers(0, 3),
    seed=st.integers(0, 50),
)
def test_as_the_plain_loop(prompts, new, block, reach, threshold, edit_threshold, max_post_steps, seed):
    editor = TokenEditing(edit_threshold, max_post_steps, reach)
    requests = [continuation(prompt, new, block, i) for i, prompt in enumerate(prompts)]
    finished, _, _ = write(requests, method(Threshold(threshold), editor), bidirectional(seed))
    for request, row in zip(requests, finished, strict=True):
        assert (row.tokens, row.passes) == plainly(request, bidirectional(seed), threshold, editor)


def hasty(tokens: torch.Tensor) -> torch.Tensor:
    """Two positions are predicted wrongly as long as anything is masked."""
    text = list(TEXT)
    if (tokens == MASK).any():
        text[3] = text[6] = WRONG
    return says(text[: len(tokens)])


def test_repairs_planted_errors():
    request = continuation(TEXT[:2], 6, None)
    without, _, _ = write([request], method(Threshold(0.9), NoEditor()), hasty)
    assert without[0].tokens == [5, 6, 7, WRONG, 9, 10, WRONG, 12]
    edited, _, steps = write([request], method(Threshold(0.9), TokenEditing(0.5)), hasty)
    assert edited[0].tokens == TEXT
    assert [int(step.changed.sum()) for step in steps] == [6, 2, 0]


def test_a_step_that_changes_nothing_ends_the_block_at_once():
    finished, _, _ = write([continuation([5], 6, 3)], method(FixedSteps(), TokenEditing()), lambda t: says([7] * 7))
    assert finished[0].passes == 6 + 2


def test_given_tokens_stay_whatever_the_model_says_of_them():
    finished, _, _ = write(
        [continuation([WRONG, WRONG], 6, None)], method(Threshold(), TokenEditing(0.0)), lambda t: says(TEXT)
    )
    assert finished[0].tokens == [WRONG, WRONG, *TEXT[2:]]


def test_an_unsure_prediction_does_not_edit():
    def logits(tokens):
        return says(TEXT, 20.0) if (tokens == MASK).any() else says([WRONG] * 8, 2.8)  # probability 0.56

    for edit_threshold, text in ((0.6, TEXT), (0.5, [WRONG] * 8)):
        finished, _, _ = write([continuation([], 8, None)], method(Threshold(), TokenEditing(edit_threshold)), logits)
        assert finished[0].tokens == text


@pytest.mark.parametrize(("reach", "repaired"), [(0, False), (1, True), (2, True)])
def test_an_error_that_the_next_block_shows_is_repaired_within_reach(reach, repaired):
    def logits(tokens):
        text = list(TEXT)
        if tokens[5] == MASK:
            text[2] = WRONG
        return says(text)

    editor = TokenEditing(0.5, reach=reach)
    finished, _, steps = write([continuation([], 8, 4)], method(Threshold(), editor), logits)
    assert finished[0].tokens == ([*TEXT] if repaired else [*TEXT[:2], WRONG, *TEXT[3:]])
    assert [step.block.first.tolist() for step in steps][-1] == [0 if reach else 4]


def test_an_edited_end_of_text_stops_and_is_not_final_before_the_block_is():
    def logits(tokens):
        text = [5, 2, 7, 8] if (tokens[:4] == MASK).any() else [5, 6, 7, 2]
        return says([*text, 9, 9, 9, 9])

    finished, _, _ = write([continuation([], 8, 4)], method(Threshold(), TokenEditing(), stop_id=2), logits)
    assert finished[0].tokens == [5, 6, 7, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("keys", [{"edit_threshold": 1.5}, {"max_post_steps": -1}, {"reach": -1}])
def test_settings_out_of_range_are_refused(keys):
    with pytest.raises(ConfigError, match=f"editor.{next(iter(keys))}: "):
        TokenEditing(**keys)


def test_who_is_trained_for_editing():
    assert not trained_for_editing(ObjectiveConfig())
    assert trained_for_editing(ObjectiveConfig(replace_ratio=0.1))
