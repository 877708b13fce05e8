from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llada_megatron.llada_moe.sampling.token_buffer import Request, TokenBuffer, continuation, infilling


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 9))
def test_blocks_of_a_continuation_lie_on_the_models_grid_and_the_last_one_is_filled_up(prompt, new, grid):
    request = continuation([7] * prompt, new, None, grid=grid)
    assert request.length == prompt + new
    assert len(request.tokens) == -(-(prompt + new) // grid) * grid
    assert all(start % grid == 0 and end == start + grid for start, end in request.blocks)
    assert request.blocks[0][0] <= prompt < request.blocks[0][1]
    assert list(request.gaps) == [False] * prompt + [True] * (len(request.tokens) - prompt)


@given(st.integers(0, 40), st.integers(1, 40), st.one_of(st.none(), st.integers(1, 50)))
def test_blocks_of_a_continuation_are_counted_from_the_prompts_end(prompt, new, size):
    request = continuation([7] * prompt, new, size)
    edges = [*(start for start, _ in request.blocks), request.blocks[-1][1]]
    assert edges == [*range(prompt, prompt + new, size or new), prompt + new]


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.one_of(st.none(), st.integers(1, 9)), st.booleans())
def test_blocks_of_an_infilling_hold_every_gap_once_in_order(gaps, size, on_grid):
    request = infilling([7] * len(gaps), gaps, size, grid=(size or 4) if on_grid else None)
    held = [i for start, end in request.blocks for i in range(start, end) if gaps[i]]
    assert held == [i for i, gap in enumerate(gaps) if gap]
    assert all(before[1] <= after[0] for before, after in zip(request.blocks, request.blocks[1:], strict=False))


def test_a_slot_forgets_what_it_held():
    buffer = TokenBuffer.empty(2, 10, 3, mask_id=3)
    buffer.put(1, continuation([5] * 4, 6, 2))
    buffer.put(1, Request([6, 0, 7], [False, True, False], [(1, 2)], stream=9))
    assert buffer.tokens[1].tolist() == [6, 3, 7] + [3] * 7
    assert buffer.open[1].nonzero().flatten().tolist() == [1]
    assert buffer.given[1].tolist() == [True, False] + [True] * 8
    assert (int(buffer.lengths[1]), int(buffer.block_count[1]), int(buffer.stream[1])) == (3, 1, 9)
    assert torch.equal(buffer.starts[1], torch.tensor([1, 0, 0]))


@pytest.mark.parametrize(
    "misfit",
    [
        Request([5] * 11, [True] * 11, [(0, 11)], 0),
        Request([5] * 4, [True] * 4, [(0, 1), (1, 2), (2, 3), (3, 4)], 0),
        Request([5] * 4, [True] * 4, [(0, 3)], 0),
        Request([5] * 4, [True] * 3, [(0, 4)], 0),
    ],
)
def test_what_does_not_fit_is_refused(misfit):
    with pytest.raises(ValueError, match="fit|outside"):
        TokenBuffer.empty(1, 10, 3, mask_id=3).put(0, misfit)
