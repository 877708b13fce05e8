"""The joint objective: its rows, and that each half costs what its own objective makes of it."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

from llada_megatron.llada_moe.config.block_schedule import BlockSchedule, BlockStage
from llada_megatron.llada_moe.config.editing import EditingConfig
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.data.batch import collate
from llada_megatron.llada_moe.diffusion.noise import Corruption, SampleCoordinates
from llada_megatron.llada_moe.model.head import Targets
from llada_megatron.llada_moe.model.patterns import CAUSAL, FULL, AttentionPattern
from llada_megatron.llada_moe.objectives import make_objective
from llada_megatron.llada_moe.objectives.autoregressive import autoregressive_row
from llada_megatron.llada_moe.objectives.joint import JointConfig, joint_row
from llada_megatron.llada_moe.objectives.masked_diffusion import diffusion_row
from llada_megatron.parallel.build import build_run_chunks
from llada_megatron.tools.bench.layouts import MODELS, parity_run
from llada_megatron.tools.bench.measurement import single_process

TRAINING = TrainingConfig(steps=8, sequence_length=32, global_batch_size=4)
RUN = parity_run(MODELS["dense"], LayoutConfig())
BOUNDARIES = np.array([0, 20, 32], np.int32)
TOKENS = np.random.default_rng(0).integers(0, 100, 32)
NOISE = Corruption(np.arange(32) % 3 > 0, 0.6, 32)


STARTED = BlockSchedule(autoregressive_tokens=128, stable=BlockStage(block_size=8, tokens=896))


def objective(block_size=8, **keys):
    config = JointConfig(kind="joint", block_size=block_size, random_length_probability=0.0, **keys)
    return make_objective(config, TRAINING)


def row_of(objective, split="train"):
    make = objective.rows(dataclasses.replace(RUN, training=TRAINING, objective=objective.config), split, 100)
    return make(TOKENS, BOUNDARIES, SampleCoordinates(0, 0, 0, 7, False))


def test_a_row_has_the_masked_text_and_then_the_text_and_its_next_tokens():
    joint = objective(autoregressive_coefficient=2.0, diffusion_coefficient=0.5)
    row, plain = row_of(joint), row_of(joint, "validation")
    masked = row.inputs[:32] == RUN.model.mask_token_id
    assert masked.any() and (row.inputs[:32][~masked] == TOKENS[~masked]).all() and (row.inputs[32:] == TOKENS).all()
    assert (row.labels[:32] == TOKENS).all() and (row.labels[32:-1] == TOKENS[1:]).all()
    assert np.allclose(row.weights[:32], masked * 0.5 / row.mask_ratio)
    last = np.isin(np.arange(32), BOUNDARIES[1:] - 1)
    assert (row.weights[32:] == np.where(last, 0.0, 2.0)).all()
    assert row.boundaries.tolist() == [0, 20, 32, 52, 64] and row.untruncated == 32
    assert set(plain.weights[32:]) == {0.0, 1.0}  # a validation has no coefficients
    assert plain.weights[:32].max() == np.float32(1 / plain.mask_ratio)


def test_behind_a_cut_nothing_is_learnt():
    noisy = diffusion_row(TOKENS, BOUNDARIES, Corruption(np.arange(32) < 5, 0.6, 10), RUN.model.mask_token_id)
    row = joint_row(noisy, TOKENS, 1.0)
    assert row.weights[32:].tolist() == [1.0] * 9 + [0.0] * 23
    assert row.boundaries.tolist() == [0, 10, 20, 32, 42, 52, 64]


@pytest.fixture(scope="module")
def model():
    """Weights larger than at the start, so that it differs what a token sees."""
    with single_process():
        (built,) = build_run_chunks(RUN)
        with torch.no_grad():
            for parameter in built.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(8)
            yield built.eval()


def sums(model, row, pattern):
    """Of the noisy and the clean half, or of the one there is."""
    batch = collate([row])
    length = batch.labels.size(1)
    clean = torch.arange(length) >= length // 2 if pattern.causal_clean else None
    targets = Targets.of(batch.labels, batch.weights, clean=clean)
    return model(batch.inputs, batch.boundaries, targets=targets, pattern=pattern).tolist()


def test_the_clean_half_costs_what_an_autoregressive_model_pays(model):
    noisy = diffusion_row(TOKENS, BOUNDARIES, NOISE, RUN.model.mask_token_id)
    (alone,) = sums(model, autoregressive_row(TOKENS, BOUNDARIES), CAUSAL)
    (masks,) = sums(model, noisy, FULL)
    found = {}
    for block in (4, 20):
        pattern = AttentionPattern(block, doubled=True, causal_clean=True)
        found[block], clean = sums(model, joint_row(noisy, TOKENS, 2.0), pattern)
        assert clean == pytest.approx(2 * alone, rel=1e-5)
    assert found[20] == pytest.approx(masks, rel=1e-5)  # blocks as long as the documents see nothing of the clean half
    assert abs(found[4] - masks) > 1e-3 * masks


def test_a_block_of_one_costs_the_text_from_left_to_right_behind_a_causal_one(model):
    """Every token is masked alone: the model is asked at a mask behind a text that it reads causally."""
    everything = diffusion_row(TOKENS, BOUNDARIES, Corruption(np.ones(32, bool), 1.0, 32), RUN.model.mask_token_id)
    (alone,) = sums(model, _masked_last(15), CAUSAL)
    only = dataclasses.replace(everything, weights=everything.weights * (np.arange(32) == 15))
    row = joint_row(only, TOKENS, 1.0)
    assert sums(model, row, AttentionPattern(1, doubled=True, causal_clean=True))[0] == pytest.approx(alone, rel=1e-5)


def _masked_last(place):
    known = np.append(TOKENS[:place], RUN.model.mask_token_id)
    row = autoregressive_row(known, np.array([0, place + 1], np.int32))
    labels, weights = row.labels.copy(), np.zeros(place + 1, np.float32)
    labels[place], weights[place] = TOKENS[place], 1.0
    return dataclasses.replace(row, labels=labels, weights=weights)


def test_figures_say_what_they_are():
    joint = objective()
    assert joint.parts(2.3, 2.0) == {"loss_autoregressive": 2.0, "loss_diffusion": pytest.approx(1.0)}
    assert not joint.loss_is_bound and joint.validation_is_bound and not joint.only_masks_supervised
    assert joint.description().startswith("1 x next token + 0.3 x block diffusion in blocks of 8")
    assert joint.sampling_pattern(5) == CAUSAL and joint.copies == 2 and joint.supervised_share == 1.5


def test_a_schedule_of_blocks_keeps_the_clean_half_also_where_one_block_is_the_sequence():
    stages = BlockSchedule(
        warmup=[BlockStage(block_size=4, tokens=4 * 4 * 32)], stable=BlockStage(block_size=32, tokens=4 * 4 * 32)
    )
    joint = objective(32, block_schedule=stages)
    assert [joint.pattern(step) for step in (0, 7)] == [
        AttentionPattern(size, doubled=True, causal_clean=True) for size in (4, 32)
    ]
    assert joint.copies == 2 and len(row_of(joint).inputs) == 64


@pytest.mark.parametrize(
    ("keys", "model", "message"),
    [
        ({"autoregressive_coefficient": 0.0}, "dense", "autoregressive_coefficient: 0.0 must be .* is kind block_dif"),
        ({"diffusion_coefficient": -1.0}, "dense", "diffusion_coefficient: -1.0 must be .* is kind autoregressive"),
        ({"block_size": None}, "dense", "block_size: null, but kind joint needs the size of a block"),
        ({"block_size": 5}, "dense", "block_size: 5 does not divide"),
        ({"replace_ratio": 0.1}, "dense", "replace_ratio: 0.1 with kind joint"),
        ({"editing": EditingConfig()}, "dense", "editing: does not go with kind joint"),
        (
            {"block_schedule": STARTED},
            "dense",
            "autoregressive_tokens: 128 with kind joint, whose every step learns next",
        ),
        ({}, "blocks", "expert_capacity: 3 with objective.kind joint: .*the next token would be known to the router"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(keys, model, message):
    joint, refused = objective(**keys), []
    run = dataclasses.replace(RUN, training=TRAINING, objective=joint.config, model=MODELS[model])
    for check in (joint.check, lambda refuse: joint.check_run(run, refuse)):
        check(lambda key, why: refused.append(f"{key}: {why}"))
    assert any(re.search(message, line) for line in refused), refused
