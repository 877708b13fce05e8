from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.sampling.canvas import Canvas, after_prompts, with_gaps
from llada_megatron.llada_moe.sampling.loop import SamplingOptions, sample
from llada_megatron.llada_moe.sampling.schedules import FixedSteps

VOCAB, MASK, EOS = 16, 3, 2
OPTIONS = SamplingOptions(mask_id=MASK, seed=5)


class Toy:
    """Logits that depend on every token of the own segment and on the position, as a bidirectional model's do."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64)
        self.place = torch.randn(64, VOCAB, generator=generator, dtype=torch.float64)
        self.seen: list[torch.Tensor] = []

    def __call__(self, tokens: torch.Tensor, rows: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
        self.seen.append(tokens.clone())
        logits = torch.zeros(*tokens.shape, VOCAB, dtype=torch.float64)
        flat, out = tokens.flatten(), logits.view(-1, VOCAB)
        for a, b in pairwise(boundaries):
            weight = torch.arange(1, b - a + 1, dtype=torch.float64)[:, None]
            out[a:b] = (self.table[flat[a:b]] / weight).sum(0) * 2 + self.table[flat[a:b]] + self.place[: b - a]
        return logits[rows]


def run(canvas: Canvas, schedule: FixedSteps, options: SamplingOptions = OPTIONS) -> tuple[Toy, int]:
    toy = Toy()
    return toy, sample(toy, canvas, schedule, options)


def rows_with_gaps() -> st.SearchStrategy:
    token = st.integers(0, VOCAB - 1)
    row = st.lists(st.tuples(token, st.booleans()), min_size=1, max_size=20)
    return st.lists(row, min_size=1, max_size=4)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    rows=rows_with_gaps(),
    block=st.one_of(st.none(), st.integers(1, 8)),
    steps=st.integers(1, 24),
    remasking=st.sampled_from(["low_confidence", "random"]),
    temperature=st.sampled_from([0.0, 0.7]),
)
def test_fills_the_gaps_touches_nothing_else_and_each_row_is_as_alone(rows, block, steps, remasking, temperature):
    tokens = [[t for t, _ in row] for row in rows]
    gaps = [[g for _, g in row] for row in rows]
    options = SamplingOptions(mask_id=MASK, seed=5, temperature=temperature)
    schedule = FixedSteps(steps, remasking, seed=5)
    together = with_gaps(tokens, gaps, MASK, block)
    run(together, schedule, options)
    assert not together.open.any()
    for i, (row, gap) in enumerate(zip(tokens, gaps, strict=True)):
        alone = with_gaps([row], [gap], MASK, block)
        alone.stream[0] = i
        run(alone, schedule, options)
        written = together.tokens[i, : len(row)].tolist()
        assert written == alone.tokens[0].tolist()
        for before, after, is_gap in zip(row, written, gap, strict=True):
            assert (after != MASK) if is_gap else (after == before)


@pytest.mark.parametrize(("steps", "expected"), [(12, [1] * 12), (6, [2] * 6), (5, [2, 2, 2, 3, 3]), (1, [6, 6])])
def test_commits_the_even_share_of_each_step(steps, expected):
    canvas = after_prompts([[5, 6, 7]], 12, MASK, block_length=6)
    toy, passes = run(canvas, FixedSteps(steps))
    masks = [int((seen == MASK).sum()) for seen in toy.seen] + [0]
    assert [a - b for a, b in pairwise(masks)] == expected
    assert passes == len(expected)


def test_the_first_steps_take_one_more():
    canvas = after_prompts([[5]], 7, MASK)
    toy, _ = run(canvas, FixedSteps(3))
    masks = [int((seen == MASK).sum()) for seen in toy.seen] + [0]
    assert masks == [7, 4, 2, 0]


def test_blocks_are_written_in_order():
    canvas = after_prompts([[5, 6]], 8, MASK, block_length=4)
    toy, _ = run(canvas, FixedSteps(8))
    for seen in toy.seen[:4]:
        assert (seen[0, 6:] == MASK).all()
    assert (toy.seen[4][0, :6] != MASK).all()


def test_low_confidence_keeps_the_most_confident():
    def forward(tokens, rows, boundaries):
        sharpness = torch.arange(tokens.shape[1], dtype=torch.float32)[:, None] * torch.eye(VOCAB)[7]
        return sharpness.expand(tokens.shape[0], -1, -1)[rows]

    canvas = after_prompts([[5]], 4, MASK)
    order = []

    def recording(tokens, rows, boundaries):
        order.append(rows[0].nonzero().flatten().tolist())
        return forward(tokens, rows, boundaries)

    sample(recording, canvas, FixedSteps(4), OPTIONS)
    assert order == [[1, 2, 3, 4], [1, 2, 3], [1, 2], [1]]
    assert canvas.tokens.tolist() == [[5, 7, 7, 7, 7]]


def test_seed_determines_the_sample_and_another_seed_draws_another():
    def text(seed: int) -> list[list[int]]:
        canvas = after_prompts([[5, 6], [9]], 10, MASK)
        run(canvas, FixedSteps(5, "random", seed), SamplingOptions(mask_id=MASK, temperature=3.0, seed=seed))
        return canvas.tokens.tolist()

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_temperature_draws_from_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, 9.0])  # the last one is the mask and excluded
    canvas = after_prompts([[0]] * 4000, 1, 3)
    sample(
        lambda t, rows, b: logits.expand(int(rows.sum()), -1),
        canvas,
        FixedSteps(1),
        SamplingOptions(mask_id=3, temperature=2.0),
    )
    share = torch.bincount(canvas.tokens[:, 1], minlength=4) / 4000
    torch.testing.assert_close(share[:3], (logits[:3] / 2).softmax(0), atol=0.03, rtol=0)
    assert share[3] == 0


def test_stops_at_end_of_text_once_nothing_before_it_is_open():
    def forward(tokens, rows, boundaries):
        logits = torch.zeros(*tokens.shape, VOCAB)
        logits[:, 2, EOS] = 5.0  # position 2 is the first to be committed, before position 1
        logits[:, 1, 9] = 3.0
        logits[:, 3:, 8] = 1.0
        return logits[rows]

    canvas = after_prompts([[5]], 6, MASK, block_length=3)
    passes = sample(forward, canvas, FixedSteps(6), SamplingOptions(mask_id=MASK, stop_id=EOS))
    assert canvas.tokens.tolist() == [[5, 9, EOS, EOS, EOS, EOS, EOS]]
    assert passes == 2


def test_an_end_of_text_in_the_prompt_does_not_stop():
    canvas = after_prompts([[EOS, 5]], 4, MASK)
    run(canvas, FixedSteps(4), SamplingOptions(mask_id=MASK, stop_id=EOS, excluded=[EOS]))
    assert (canvas.tokens[0, 2:] != EOS).all()


def test_guidance_moves_away_from_the_unconditional_prediction():
    def forward(tokens, rows, boundaries):
        given = (tokens[:, :1] == 5).float()[..., None]
        logits = torch.zeros(*tokens.shape, VOCAB)
        logits[..., 8] = 1.0
        logits[..., 9:10] = 0.9 * given.expand(*tokens.shape, 1)
        return logits[rows]

    for guidance, token in ((0.0, 8), (1.0, 9)):
        canvas = after_prompts([[5]], 2, MASK)
        sample(forward, canvas, FixedSteps(1), SamplingOptions(mask_id=MASK, guidance=guidance))
        assert canvas.tokens[0, 1:].tolist() == [token, token]


def test_padding_is_a_segment_of_its_own():
    canvas = with_gaps([[5, 6, 7], [8]], [[False, True, False], [True]], MASK)
    assert canvas.boundaries(torch.tensor([0, 1])).tolist() == [0, 3, 4, 6]
    assert canvas.boundaries(torch.tensor([1])).tolist() == [0, 1, 3]


def test_nothing_to_fill_needs_no_pass():
    canvas = with_gaps([[5, MASK]], [[False, False]], MASK)
    assert sample(Toy(), canvas, FixedSteps(3), OPTIONS) == 0
    assert canvas.tokens.tolist() == [[5, MASK]]
