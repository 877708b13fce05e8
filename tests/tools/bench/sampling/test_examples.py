"""Training batches: what is masked, what is wrong on purpose, what is supervised and how heavily."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llada_megatron.llada_moe.model.patterns import segments
from llada_megatron.tools.bench.sampling.language import ExampleBatches, JointBatches, Language

LANGUAGE = Language()
BATCHES = ExampleBatches(LANGUAGE, 64, 192, 128, edited_sequences=0.5, edited_tokens=0.1, seed=3)
PLAIN = dataclasses.replace(BATCHES, edited_sequences=0.0)


def response_of(batch, window):
    """Positions of the responses: behind the last position before which nothing is supervised in 64 batches' worth."""
    positions = torch.arange(batch.inputs.shape[1])
    stop = batch.inputs.shape[1] if window is None else batch.answer[:, None] * 0 + starts(batch, window) + window
    return (positions >= starts(batch, window)) & (positions < stop)


def starts(batch, window):
    length = batch.inputs.shape[1]
    if window is None:
        return length - batch.answer[:, None]
    cuts = {segment.row: segment.stop for segment in reversed(segments(batch.boundaries, length))}
    return torch.tensor([[cuts[row] - window] for row in range(len(cuts))])


@pytest.mark.parametrize("window", [128, None])
def test_prompts_stay_and_masks_are_weighted_by_their_ratio(window):
    batch = dataclasses.replace(PLAIN, window=window).batch(0)
    response = response_of(batch, window)
    masked = batch.inputs == LANGUAGE.mask_id
    assert torch.equal(batch.inputs[~masked], batch.labels[~masked])
    assert not masked[~response].any()
    assert torch.equal(batch.weights, masked / batch.mask_ratio[:, None])
    shares = masked.sum(1) / batch.answer
    assert torch.allclose(shares, batch.mask_ratio, atol=0.15)
    assert batch.mask_ratio.min() < 0.15 and batch.mask_ratio.max() > 0.85
    first = starts(batch, window).flatten()
    assert torch.equal(batch.labels[torch.arange(64), first - 1] >= LANGUAGE.number(8), torch.ones(64).bool())


def test_a_full_window_is_a_segment_of_its_own_and_a_block_causal_sequence_is_one():
    batch = BATCHES.batch(0)
    spans = [(s.start, s.stop) for s in segments(batch.boundaries, 192) if s.row == 0]
    assert spans[0][0] == 0 and spans[-1][1] == 192 and len(spans) == 2
    assert torch.equal(batch.answer, torch.full((64,), 128))
    assert not batch.weights[0, spans[0][1] :].any()
    whole = dataclasses.replace(BATCHES, window=None).batch(0)
    assert len(segments(whole.boundaries, 192)) == 64


def test_wrong_tokens_are_visible_ones_of_some_sequences_and_all_of_those_are_supervised():
    batch = BATCHES.batch(0)
    response = response_of(batch, 128)
    masked = batch.inputs == LANGUAGE.mask_id
    visible, wrong = response & ~masked, ~masked & (batch.inputs != batch.labels)
    supervised = visible & (batch.weights > 0)
    assert torch.equal(supervised.any(1), (visible == supervised).all(1) & visible.any(1))  # all or none of a sequence
    assert 20 < supervised.any(1).sum() < 44
    assert (batch.weights[supervised] == 1).all()
    assert not (wrong & ~supervised).any()
    assert 0.05 < wrong.sum() / supervised.sum() < 0.15


def test_a_batch_is_a_function_of_the_step():
    assert torch.equal(BATCHES.batch(5).inputs, BATCHES.batch(5).inputs)
    assert not torch.equal(BATCHES.batch(5).labels, BATCHES.batch(6).labels)
    assert torch.equal(BATCHES.batch(5).labels, PLAIN.batch(5).labels)


def test_both_halves_for_a_model_that_drafts_and_verifies():
    plain = dataclasses.replace(PLAIN, window=None)
    noisy, both = plain.batch(0), JointBatches(plain, 2.0, 0.5).batch(0)
    assert torch.equal(both.inputs, torch.cat([noisy.inputs, noisy.labels], 1))
    assert torch.equal(both.weights[:, :192], 0.5 * noisy.weights)
    following, clean = both.labels[:, 192:], both.weights[:, 192:]
    assert torch.equal(following[:, :-1], noisy.labels[:, 1:]) and not clean[:, -1].any()
    response = response_of(noisy, None)
    assert torch.equal(clean[:, :-1], 2.0 * response[:, 1:])
    assert [(s.start, s.stop) for s in segments(both.boundaries, 384)] == [(0, 192), (192, 384)] * 64
