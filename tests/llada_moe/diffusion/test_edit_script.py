"""Drafts with tokens too few and too many, and the labels that lead them back to the text."""

from __future__ import annotations

import functools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.diffusion.edit_script import Operations, arrange, edit_labels
from llada_megatron.llada_moe.sampling.editors import Levenshtein
from llada_megatron.llada_moe.sampling.schedules import Threshold
from llada_megatron.llada_moe.sampling.token_buffer import continuation
from tests.llada_moe.sampling.editors.rows import DELETE, INSERT, MASK, method, says
from tests.llada_moe.sampling.toy import write

IDS = Operations(DELETE, INSERT, MASK)
WORDS = st.integers(4, 8)


def labels_of(draft: list[int], text: list[int]) -> list[int]:
    return edit_labels(np.array([draft]), np.array([text]), IDS)[0].tolist()


def test_labels_by_hand():
    text = [4, 5, 6, 7]
    assert labels_of(text, text) == labels_of([MASK] * 4, text) == labels_of([4, 9, MASK, 7], text) == text
    assert labels_of([4, 9, 5, 6], text) == [4, DELETE, 5, 6]  # one too many: the end of the text was lost
    assert labels_of([4, 6, 7, MASK], text) == [4, INSERT, 7, DELETE]  # one is missing: a mask filled the block up
    assert labels_of([4, 7, MASK, MASK], text) == [4, 5, 6, 7]  # as many in common by replacing, which is preferred
    assert labels_of([7, 9, 9, 9], text) == [INSERT, DELETE, DELETE, DELETE]  # once, though three are missing
    assert labels_of([MASK, 6, MASK, MASK], text) == [4, INSERT, 7, DELETE]  # masks stand for the earliest they can


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20), st.data())
def test_an_arrangement_is_a_plain_loop_over_each_block(draws, data):
    missing, surplus = np.array(draws).T
    blocks = np.array(sorted(data.draw(st.lists(st.integers(0, 3), min_size=len(draws), max_size=len(draws)))))
    blocks = np.unique(blocks, return_inverse=True)[1]
    expected: list[tuple[int, bool]] = []
    for block in range(blocks[-1] + 1):
        places = np.flatnonzero(blocks == block).tolist()
        shown = [(p, added) for p in places for added in (True, False) if (surplus[p] if added else not missing[p])]
        expected += (shown + [(-1, False)] * len(places))[: len(places)]
    found = arrange(blocks, missing, surplus)
    assert list(zip(found.source.tolist(), found.surplus.tolist(), strict=True)) == expected


def common(draft: list[int], text: list[int]) -> int:
    """The length of the longest common subsequence, where a mask equals any token."""

    @functools.cache
    def longest(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return 0
        same = draft[i - 1] in (text[j - 1], MASK)
        return max(longest(i - 1, j), longest(i, j - 1), longest(i - 1, j - 1) + same)

    return longest(len(draft), len(text))


def carried_out(draft: list[int], labels: list[int], masks_too: bool) -> list[int]:
    """The draft after one step; `masks_too`: also what is masked is written."""
    cells: list[int] = []
    for token, label in zip(draft, labels, strict=True):
        if label == INSERT:
            cells += [MASK, token]
        elif label != DELETE:
            cells.append(label if token != MASK or masks_too else MASK)
    return (cells + [MASK] * len(draft))[: len(draft)]


@settings(max_examples=40)
@given(st.integers(1, 9), st.data())
def test_labels_keep_the_most_in_common_and_lead_to_the_text(size, data):
    text = data.draw(st.lists(WORDS, min_size=size, max_size=size))
    draft = data.draw(st.lists(WORDS | st.just(MASK), min_size=size, max_size=size))
    labels = labels_of(draft, text)
    kept = sum(
        label in (token, INSERT) or (token == MASK and label != DELETE)
        for token, label in zip(draft, labels, strict=True)
    )
    assert kept == common(draft, text)
    for masks_too in (True, False):
        shown = draft
        for _ in range(3 * size):
            shown = carried_out(shown, labels_of(shown, text), masks_too)
        assert shown == text if masks_too else all(a in (b, MASK) for a, b in zip(shown, text, strict=True))


@settings(max_examples=15)
@given(st.data())
def test_the_editor_that_carries_them_out_writes_the_text(data):
    """A model that first says something else, and then what the labels say of what it sees."""
    text = data.draw(st.lists(WORDS, min_size=6, max_size=6))
    first = data.draw(st.lists(WORDS, min_size=6, max_size=6))
    left = [first]

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        return says(left.pop() if left else labels_of(tokens.tolist(), text))

    editor = Levenshtein(delete_id=DELETE, insert_id=INSERT)
    finished, _, _ = write([continuation([], 6, None)], method(Threshold(0.5), editor), logits)
    assert finished[0].tokens == text
