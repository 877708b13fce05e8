"""Recipes of models that are trained in a second, for the tests of the benchmarks of sampling."""

from __future__ import annotations

import dataclasses

from llada_megatron.tools.bench.sampling import models, rank_figures
from llada_megatron.tools.bench.sampling.language import Language
from llada_megatron.tools.bench.sampling.models import EditingRecipe, JointRecipe, Recipe

LANGUAGE = Language(
    tail_length=1, tail_choices=40, prompt_sentences=(1, 2), response_sentences=(2, 3), longest_title=3, title_words=20,
    vocab_size=256,
)  # fmt: skip
TINY = Recipe(steps=1, learning_rate=1e-2, language=LANGUAGE, new_tokens=12, num_layers=2, hidden_size=32,
              ffn_hidden_size=48, heads=2, sequences=2, warmup_steps=0)  # fmt: skip
CAUSAL = dataclasses.replace(TINY, block_size=8, parent=TINY)
EDITS = EditingRecipe(**{**vars(CAUSAL), "parent": CAUSAL, "editing": models.EDITING.editing})
JOINT = JointRecipe(**(vars(TINY) | {"block_size": 8, "edited_sequences": 0.0}))


def use_small_models(monkeypatch) -> None:
    """Let the benchmark train these models, and count bytes under one layout only."""
    recipes = {"bidirectional": TINY, "block-causal": CAUSAL, "editing": EDITS, "joint": JOINT}
    monkeypatch.setattr(models, "RECIPES", recipes)
    monkeypatch.setattr(rank_figures, "LAYOUTS", {"TP2": rank_figures.LAYOUTS["TP2"]})


def rows(text: str) -> list[str]:
    """The names in the table that was printed."""
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")][2:]
