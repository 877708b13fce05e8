"""Small models: trained once, found again, finished from another, and ordinary checkpoints of this project."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from llada_megatron.llada_moe.config.editing import EditingConfig
from llada_megatron.llada_moe.model.patterns import whole_sequences
from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint
from llada_megatron.tools.bench.sampling import models
from llada_megatron.tools.bench.sampling.language import Language
from llada_megatron.tools.bench.sampling.models import EditingRecipe, Recipe, train_or_find
from llada_megatron.tools.convert.inspector import describe, open_source
from llada_megatron.tools.inspect import load_model

TINY = Recipe(
    steps=4,
    learning_rate=1e-2,
    language=Language(vocab_size=1280),
    new_tokens=120,
    num_layers=1,
    hidden_size=32,
    ffn_hidden_size=48,
    heads=2,
    sequences=2,
    warmup_steps=0,
)
CHILD = Recipe(**(vars(TINY) | {"steps": 1, "learning_rate": 0.0, "block_size": 32, "parent": TINY}))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def logits(path, tokens):
    with open_checkpoint(path) as loaded:
        rows = torch.ones_like(tokens, dtype=torch.bool)
        return loaded.logits(tokens, rows, whole_sequences(*tokens.shape)).view(*tokens.shape, -1)


def test_a_model_is_trained_once_and_found_again(directory, monkeypatch, capsys):
    path = train_or_find(directory, TINY)
    assert "step 4/4" in capsys.readouterr().err
    monkeypatch.setattr(models, "_train", None)  # would fail if it were called
    assert train_or_find(directory, TINY) == path
    assert capsys.readouterr().err == ""


def test_every_setting_is_part_of_the_name():
    changed = [
        dataclasses.replace(TINY, steps=5),
        dataclasses.replace(TINY, edited_tokens=0.2),
        dataclasses.replace(TINY, language=Language(vocab_size=1280, seed=8)),
        CHILD,
        dataclasses.replace(CHILD, parent=dataclasses.replace(TINY, seed=1)),
    ]
    assert len({recipe.name for recipe in [TINY, *changed]}) == 6


def test_the_threads_are_the_callers_during_the_training_only(directory, monkeypatch):
    seen = []
    monkeypatch.setattr(models, "_train", lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    train_or_find(directory, dataclasses.replace(TINY, seed=9), threads=2)
    assert seen == [2] and torch.get_num_threads() == before


def test_a_child_has_its_parents_weights_and_its_own_attention(directory):
    tokens = torch.tensor([[*Language(vocab_size=1280).example(1).prompt[:32], *[TINY.language.mask_id] * 32]])
    changed = tokens.clone()
    changed[0, 40] = 5
    parent, child = train_or_find(directory, TINY), train_or_find(directory, CHILD)
    whole = logits(parent, tokens)
    assert not torch.equal(whole, logits(parent, changed)[:, :32])
    blocks = logits(child, tokens)
    torch.testing.assert_close(blocks[:, 32:], whole[:, 32:])  # the last block sees everything in both
    assert torch.equal(blocks[:, :32], logits(child, changed)[:, :32])


def test_a_model_is_an_ordinary_checkpoint(directory):
    path = train_or_find(directory, TINY)
    source = open_source(path)
    found = describe(source)
    source.close()
    assert not found["faults"]
    assert load_model(str(path / models.MODEL_FILE)) == TINY.model


def test_a_model_that_edits_has_learnt_it_by_the_products_objective(directory):
    recipe = EditingRecipe(**{**vars(CHILD), "editing": models.EDITING.editing})
    assert recipe.length % 32 == 0 and recipe.name != dataclasses.replace(recipe, editing=EditingConfig()).name
    batch, language = recipe.batches.batch(3), recipe.language
    assert batch.inputs.shape == (2, 2 * recipe.length)
    clean, labels = batch.inputs[:, recipe.length :], batch.labels[:, : recipe.length]
    example = language.example(recipe.seed * 1_000_003 + 6)
    tokens = example.prompt + example.response
    assert clean[0, : len(tokens)].tolist() == tokens and (clean[0, len(tokens) :] == language.eos_id).all()
    rows = [recipe.batches.batch(step) for step in range(8)]
    said = {int(i) for each in rows for i in each.labels.unique()}
    assert {recipe.model.delete_token_id, recipe.model.insert_token_id} <= said and labels.shape == clean.shape
    with open_checkpoint(train_or_find(directory, recipe)) as loaded:
        assert loaded.run.objective == recipe.run.objective and loaded.run.objective.trains_editing


def test_training_learns(directory):
    from llada_megatron.tools.bench.measurement import single_process
    from llada_megatron.tools.bench.our_step import OurStep

    with single_process():
        ours = OurStep(TINY.run)
        losses = [ours.step_on(TINY.batches.batch(0)) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
