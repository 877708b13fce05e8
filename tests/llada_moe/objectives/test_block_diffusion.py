"""Block diffusion: its rows, and its two limits: masked diffusion, and the cost of a text from left to right."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.config.block_schedule import BlockSchedule, BlockStage
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.data.batch import collate
from llada_megatron.llada_moe.diffusion.noise import Corruption, ForwardProcess, SampleCoordinates
from llada_megatron.llada_moe.model.head import Targets
from llada_megatron.llada_moe.model.patterns import CAUSAL, FULL, AttentionPattern
from llada_megatron.llada_moe.objectives import make_objective
from llada_megatron.llada_moe.objectives.autoregressive import autoregressive_row
from llada_megatron.llada_moe.objectives.block_diffusion import BlockDiffusionConfig
from llada_megatron.llada_moe.objectives.block_rows import blocks_of, doubled_row
from llada_megatron.llada_moe.objectives.masked_diffusion import diffusion_row
from llada_megatron.parallel.build import build_run_chunks
from llada_megatron.tools.bench.layouts import MODELS, parity_run
from llada_megatron.tools.bench.measurement import single_process

TRAINING = TrainingConfig(steps=8, sequence_length=32, global_batch_size=4)
RUN = parity_run(MODELS["dense"], LayoutConfig())
MASK = RUN.model.mask_token_id
BOUNDARIES = np.array([0, 20, 32], np.int32)
TOKENS = np.random.default_rng(0).integers(0, RUN.model.vocab_size - 2, 32)


def objective(block_size=8, **keys):
    config = BlockDiffusionConfig(kind="block_diffusion", block_size=block_size, random_length_probability=0.0, **keys)
    return make_objective(config, TRAINING)


def row_of(objective, split="train", number=0, boundaries=BOUNDARIES, inverse=False):
    make = objective.rows(dataclasses.replace(RUN, training=TRAINING, objective=objective.config), split, 100)
    return make(TOKENS, boundaries, SampleCoordinates(number, 0, 0, 7, inverse))


def test_a_row_is_the_noisy_text_and_then_the_text():
    row = row_of(objective())
    masked = row.weights[:32] > 0
    assert masked.any() and (row.inputs[:32][masked] == MASK).all()
    assert (row.inputs[:32][~masked] == TOKENS[~masked]).all() and (row.inputs[32:] == TOKENS).all()
    assert (row.labels[:32] == TOKENS).all() and not row.weights[32:].any()
    assert row.boundaries.tolist() == [0, 20, 32, 52, 64]
    assert np.unique(row.weights[:32][masked]) == np.float32(1 / row.mask_ratio) and row.untruncated == 32


def test_a_run_may_begin_with_the_rows_of_an_autoregressive_one():
    stages = BlockSchedule(autoregressive_tokens=4 * 32, stable=BlockStage(block_size=8, tokens=4 * 32))
    begins = objective(8, block_schedule=stages)
    wanted = autoregressive_row(TOKENS, BOUNDARIES)
    for name, value in vars(wanted).items():
        assert np.array_equal(getattr(row_of(begins, number=3), name), value), name
    assert row_of(begins, number=4).inputs.tolist() == row_of(objective(8), number=4).inputs.tolist()
    begins.step = 0  # a validation has the rows of its step
    assert row_of(begins, "validation", number=9).inputs.tolist() == TOKENS.tolist()
    assert begins.copies == 2


def test_a_block_as_long_as_the_sequence_is_masked_diffusion_to_the_bit():
    blocks, whole = objective(32), make_objective(dataclasses.replace(RUN.objective, random_length_probability=0.0))
    ours, theirs = row_of(blocks), row_of(whole)
    for name, value in vars(theirs).items():
        assert np.array_equal(getattr(ours, name), value), name
    assert blocks.pattern(0) == whole.pattern(0) == blocks.sampling_pattern(1) == FULL


def test_weights_without_times_are_for_training_only():
    plain, weighted = objective(weighting="none"), objective()
    masked = row_of(weighted).weights > 0
    assert (row_of(plain).weights == masked).all()
    assert np.array_equal(row_of(plain, "validation").weights, row_of(weighted, "validation").weights)
    assert weighted.loss_is_bound and not plain.loss_is_bound and plain.validation_is_bound


@pytest.mark.parametrize("time_per", ["sequence", "block"])
def test_the_second_of_a_pair_has_the_other_masks_and_is_of_the_same_stage(time_per):
    stages = BlockSchedule(
        warmup=[BlockStage(block_size=4, tokens=4 * 4 * 32)], stable=BlockStage(block_size=32, tokens=4 * 4 * 32)
    )
    pairs = objective(32, time_per=time_per, complementary_masks=True, block_schedule=stages)
    assert pairs.has_pairs("train") and not pairs.has_pairs("validation")
    assert len(row_of(pairs, number=7).inputs) == 64 and len(row_of(pairs, number=8).inputs) == 32  # two pairs a step
    one, other = row_of(pairs), row_of(pairs, inverse=True)
    assert ((one.weights[:32] > 0) ^ (other.weights[:32] > 0)).all() and one.mask_ratio + other.mask_ratio == 1
    assert (one.inputs[32:] == other.inputs[32:]).all() and not other.weights[32:].any()
    weights = np.where(one.weights > 0, one.weights, other.weights)[:32]
    back = np.where(one.weights > 0, other.weights, one.weights)[:32]
    assert (weights > 1).all() and not back.any()


def test_every_block_with_a_time_of_its_own():
    own = objective(time_per="block", mask_ratio_min=0.4, mask_ratio_max=0.8)
    row = row_of(own)
    blocks = blocks_of(BOUNDARIES, 8)
    assert blocks.tolist() == [0] * 8 + [1] * 8 + [2] * 4 + [3] * 8 + [4] * 4
    for block in range(5):
        assert len(set(row.weights[:32][(blocks == block) & (row.weights[:32] > 0)])) <= 1
    ratios = 1 / row.weights[:32][row.weights[:32] > 0]
    assert len(set(ratios)) > 2 and ((ratios > 0.4) & (ratios < 0.81)).all()
    assert not own.only_masks_supervised and objective().only_masks_supervised


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(2, 6), st.integers(0, 3))
def test_stratified_times_take_each_stratum_of_all_blocks_of_a_batch_once(blocks, batch, number):
    config = BlockDiffusionConfig(kind="block_diffusion", block_size=4, time_sampling="stratified", epsilon=0.0)
    noise = ForwardProcess(config, 3, batch)
    at = [SampleCoordinates(number * batch + place, 0, 0, place) for place in range(batch)]
    drawn = np.concatenate([noise.mask_ratios(one, blocks) for one in at])
    assert sorted(np.floor(drawn * batch * blocks).astype(int)) == list(range(batch * blocks))


def test_times_of_blocks_are_uniform():
    noise = ForwardProcess(BlockDiffusionConfig(kind="block_diffusion", block_size=4), 3, 8)
    drawn = np.concatenate([noise.mask_ratios(SampleCoordinates(0, 0, 0, window), 50) for window in range(40)])
    assert abs(drawn.mean() - 0.5) < 4 * 0.289 / 2000**0.5 and np.unique(drawn).size == 2000


@pytest.fixture(scope="module")
def model():
    """Four layers over 32 positions, in a world of this process; weights larger than at the start, so that it differs
    what a token sees."""
    with single_process():
        (built,) = build_run_chunks(RUN)
        with torch.no_grad():
            for parameter in built.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(8)
            yield built.eval()


def loss_of(model, row, pattern) -> float:
    batch = collate([row])
    targets = Targets.of(batch.labels, batch.weights)
    return float(model(batch.inputs, batch.boundaries, targets=targets, pattern=pattern)[0])


def test_both_halves_in_blocks_as_long_as_the_documents_cost_what_masked_diffusion_does(model):
    row = diffusion_row(TOKENS, BOUNDARIES, Corruption(np.arange(32) % 3 > 0, 0.6, 32), MASK)
    whole = loss_of(model, row, FULL)
    assert loss_of(model, doubled_row(row, TOKENS), AttentionPattern(20, doubled=True)) == pytest.approx(
        whole, rel=1e-6
    )
    in_blocks = loss_of(model, doubled_row(row, TOKENS), AttentionPattern(5, doubled=True))
    assert abs(in_blocks - whole) > 1e-3 * whole


def test_blocks_of_one_token_cost_the_text_from_left_to_right(model):
    """The cost of each token given those before it, one causal pass a token; the model is asked at a mask."""
    tokens, boundaries = TOKENS[:12], np.array([0, 5, 12], np.int32)
    costs = np.zeros(12)
    for start, stop in ((0, 5), (5, 12)):
        for place in range(start, stop):
            known = np.append(tokens[start:place], MASK)[None]
            rows = torch.zeros(known.shape, dtype=torch.bool)
            rows[0, -1] = True
            logits = model(torch.from_numpy(known), None, rows=rows, pattern=CAUSAL)[0]
            costs[place] = -float(logits.log_softmax(-1)[tokens[place]])
    pattern = AttentionPattern(1, doubled=True)
    all_masked = diffusion_row(tokens, boundaries, Corruption(np.ones(12, bool), 1.0, 12), MASK)
    assert loss_of(model, doubled_row(all_masked, tokens), pattern) == pytest.approx(costs.sum(), rel=1e-5)
    for seed in range(3):  # whatever is masked: each mask costs the same, so that the mean over noise is the sum
        mask = np.random.default_rng(seed).random(12) < 0.5
        some = diffusion_row(tokens, boundaries, Corruption(mask, 0.5, 12), MASK)
        found = loss_of(model, doubled_row(some, tokens), pattern)
        assert found == pytest.approx((costs * mask / 0.5).sum(), rel=1e-5)


def test_a_block_sees_no_clean_token_of_its_own_or_of_a_later_block(model):
    pattern, rows = AttentionPattern(4, doubled=True), torch.zeros(1, 64, dtype=torch.bool)
    rows[0, 8:12] = True
    noisy = np.where(np.arange(32) % 2 > 0, MASK, TOKENS)
    boundaries = torch.tensor([0, 32, 64], dtype=torch.int32)

    def logits(changed):
        clean = TOKENS.copy()
        clean[changed] = (clean[changed] + 1) % 20
        inputs = torch.from_numpy(np.concatenate([noisy, clean]))[None]
        return model(inputs, boundaries, rows=rows, pattern=pattern)

    plain = logits([])
    assert torch.equal(logits([8, 11, 12, 31]), plain) and not torch.equal(logits([7]), plain)
