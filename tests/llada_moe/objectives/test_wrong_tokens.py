"""Wrong tokens beside masks in block diffusion: which there are, what is learnt of them, and what is refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_megatron.llada_moe.config.editing import EditingConfig
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.data.batch import Row
from llada_megatron.llada_moe.diffusion.edit_script import Operations, edit_labels
from llada_megatron.llada_moe.diffusion.noise import SampleCoordinates
from llada_megatron.llada_moe.objectives import make_objective
from llada_megatron.llada_moe.objectives.block_diffusion import BlockDiffusionConfig
from llada_megatron.llada_moe.objectives.block_rows import blocks_of
from llada_megatron.tools.bench.layouts import MODELS, parity_run

LENGTH, SIZE, WORDS = 64, 8, 100
DELETE, INSERT = 120, 121
BASE = parity_run(
    dataclasses.replace(MODELS["dense"], delete_token_id=DELETE, insert_token_id=INSERT, eos_token_id=7),
    LayoutConfig(),
)
MASK, SPECIAL = BASE.model.mask_token_id, {7, DELETE, INSERT, BASE.model.mask_token_id}
BOUNDARIES = np.array([0, 20, 44, LENGTH], np.int32)
MOVES = {"missing_ratio": 0.1, "surplus_ratio": 0.1}


def objective(editing: dict[str, float] | None, **keys):
    section = None if editing is None else EditingConfig(**editing)
    keys = {"random_length_probability": 0.3, "block_size": SIZE} | keys
    config = BlockDiffusionConfig(kind="block_diffusion", editing=section, **keys)
    return make_objective(config, TrainingConfig(steps=8, sequence_length=LENGTH, global_batch_size=4))


def row_of(learnt, window: int, seed: int = 0, split: str = "train", inverse: bool = False) -> tuple[Row, np.ndarray]:
    """A row, and its text."""
    training = dataclasses.replace(learnt.training, seed=seed)
    run = dataclasses.replace(BASE, training=training, objective=learnt.config)
    text = np.random.default_rng(window).integers(0, WORDS, LENGTH)
    return learnt.rows(run, split, WORDS)(text, BOUNDARIES, SampleCoordinates(0, 0, 0, window, inverse)), text


def same(one: Row, other: Row) -> bool:
    return all(np.array_equal(value, getattr(other, name)) for name, value in vars(one).items())


KEYS = st.fixed_dictionaries(
    {"time_per": st.sampled_from(["sequence", "block"]), "weighting": st.sampled_from(["inverse", "none"])}
)
CASES = settings(max_examples=12, deadline=None)


@CASES
@given(st.integers(0, 2**40), st.integers(0, 500), KEYS, st.floats(0.01, 0.9), st.floats(0.1, 5))
def test_what_is_shown_is_learnt_by_its_true_label(seed, window, keys, ratio, weight):
    editing = {"share": 1.0, "replace_ratio": ratio, "weight": weight}
    row, text = row_of(objective(editing, **keys), window, seed)
    plain, _ = row_of(objective(None, **keys), window, seed)
    assert np.array_equal(row.labels[:LENGTH], text) and np.array_equal(row.inputs[LENGTH:], text)
    assert not row.weights[LENGTH:].any() and not row.weights[row.untruncated : LENGTH].any()
    masked = plain.weights > 0
    assert np.array_equal(row.inputs[masked], plain.inputs[masked])
    assert np.array_equal(row.weights[masked], plain.weights[masked])
    shown = ~masked[: row.untruncated]
    assert (row.weights[: row.untruncated][shown] == np.float32(weight)).all()
    replaced = row.inputs != plain.inputs
    assert not replaced[row.untruncated :].any() and not set(row.inputs[replaced]) & SPECIAL
    assert (row.inputs[replaced] != plain.labels[replaced]).all() and (row.inputs[replaced] < WORDS).all()


@CASES
@given(st.integers(0, 2**40), st.integers(0, 500), KEYS, st.floats(0, 1), st.booleans())
def test_noise_is_a_function_of_the_coordinates_and_a_share_of_the_sequences_has_it(seed, window, keys, share, moves):
    editing = {"share": share} | (MOVES if moves else {})
    row, _ = row_of(objective(editing, **keys), window, seed)
    assert same(row, row_of(objective(editing, **keys), window, seed)[0])
    chosen, plain = (row_of(objective({**editing, "share": s}, **keys), window, seed)[0] for s in (1.0, 0.0))
    assert same(row, plain) or same(row, chosen)
    assert same(plain, row_of(objective(None, **keys), window, seed)[0])
    for learnt in (objective(editing, **keys), objective(None, **keys)):
        assert same(
            row_of(learnt, window, seed, "validation")[0], row_of(objective(None), window, seed, "validation")[0]
        ) or (keys["time_per"] == "block")


def test_how_much_is_wrong():
    learnt = objective({"share": 0.3, "replace_ratio": 0.2}, random_length_probability=0.0)
    rows = [row_of(learnt, window)[0] for window in range(600)]
    edited = [row for row in rows if (row.weights[:LENGTH] > 0).all()]
    assert abs(len(edited) - 180) < 4 * (600 * 0.3 * 0.7) ** 0.5
    wrong = sum(int(((row.inputs != row.labels) & (row.inputs != MASK))[:LENGTH].sum()) for row in edited)
    shown = sum(int((row.inputs[:LENGTH] != MASK).sum()) for row in edited)
    assert abs(wrong - 0.2 * shown) < 4 * (0.16 * shown) ** 0.5
    assert learnt.supervised_share == pytest.approx(0.3 + 0.7 * 0.5)


def test_both_of_a_pair_of_complementary_masks_have_wrong_tokens_or_neither():
    pairs = objective({"share": 0.5}, complementary_masks=True, random_length_probability=0.0)
    kinds = set()
    for window in range(20):
        one, other = row_of(pairs, window)[0], row_of(pairs, window, inverse=True)[0]
        kinds.add(tuple(bool((row.weights[:LENGTH] > 0).all()) for row in (one, other)))
    assert kinds == {(True, True), (False, False)}


@CASES
@given(st.integers(0, 2**40), st.integers(0, 500), KEYS)
def test_whole_blocks_move_and_are_labelled_by_what_puts_them_right(seed, window, keys):
    row, text = row_of(objective({"share": 1.0, **MOVES}, **keys), window, seed)
    still, _ = row_of(objective({"share": 1.0}, **keys), window, seed)
    assert np.array_equal(row.inputs[LENGTH:], text) and not row.weights[LENGTH:].any()
    assert row.untruncated == still.untruncated and np.array_equal(row.boundaries, still.boundaries)
    blocks = blocks_of(row.boundaries[row.boundaries <= LENGTH], SIZE)
    for block in range(blocks[-1] + 1):
        at = np.flatnonzero(blocks == block)
        if len(at) < SIZE or at[-1] >= row.untruncated:
            assert np.array_equal(row.inputs[at], still.inputs[at]) and np.array_equal(row.labels[at], text[at])
            assert np.array_equal(row.weights[at], still.weights[at])
        else:
            expected = edit_labels(row.inputs[at][None], text[at][None], Operations(DELETE, INSERT, MASK))
            assert np.array_equal(row.labels[at], expected[0]) and (row.weights[at] > 0).all()
            assert not set(row.inputs[at]) & (SPECIAL - {MASK, 7})


@CASES
@given(st.integers(0, 2**40), st.integers(0, 500), KEYS, st.floats(0.05, 0.9))
def test_what_the_model_predicts_itself_is_a_mask_until_then(seed, window, keys, ratio):
    editing = {"share": 1.0, "draft_share": 1.0, "draft_ratio": ratio, **MOVES}
    row, text = row_of(objective(editing, **keys), window, seed)
    plain, _ = row_of(objective(None, **keys), window, seed)
    drafted = row.drafted
    assert drafted is not None and not drafted[row.untruncated :].any() and not (drafted & (plain.weights > 0)).any()
    assert (row.inputs[drafted] == MASK).all() and (row.weights[drafted] == 1).all()
    assert np.array_equal(row.inputs[~drafted], plain.inputs[~drafted]) and np.array_equal(row.labels[:LENGTH], text)
    assert plain.drafted is None and row_of(objective({"share": 1.0}, **keys), window, seed)[0].drafted is None
    assert objective(editing).writes_drafts(0) and not objective({"share": 1.0}).writes_drafts(0)


def test_moved_text_teaches_both_operations():
    rows = [row_of(objective({"share": 1.0, **MOVES}), window)[0] for window in range(40)]
    labels = np.concatenate([row.labels[:LENGTH] for row in rows])
    assert (labels == DELETE).mean() > 0.02 and (labels == INSERT).mean() > 0.02
    assert np.mean([np.mean(row.labels[:LENGTH] < WORDS) for row in rows]) > 0.5


def test_what_figures_mean_with_wrong_tokens():
    with_, without, off = objective({"share": 0.1}), objective(None), objective({"share": 0.0})
    assert not with_.loss_is_bound and with_.validation_is_bound and not with_.only_masks_supervised
    assert without.loss_is_bound and without.only_masks_supervised and without.supervised_share == 0.5
    assert off.loss_is_bound and off.only_masks_supervised and off.supervised_share == 0.5
    assert (
        "0.1 of the sequences have wrong tokens" in with_.description() and off.description() == without.description()
    )
    assert with_.config.trains_editing and not without.config.trains_editing and not off.config.trains_editing
