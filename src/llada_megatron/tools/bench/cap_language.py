"""`llada bench cap --language`: confidence-aware training on the small language of `llada bench sample`.

Its block-causal model is fine-tuned further twice, on the same texts with the same masks and steps: as before, and with
the entropy of correct predictions in the loss. Both answer held-out prompts at several thresholds of confidence.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.console import message
from llada_megatron.llada_moe.objectives.fine_tuning import FineTuningConfig
from llada_megatron.tools.bench import Claim, at_least, reported
from llada_megatron.tools.bench.equal_accuracy import speed_ratio
from llada_megatron.tools.bench.sampling.candidates import OurSamplers, PresetOnModel
from llada_megatron.tools.bench.sampling.figures import measure
from llada_megatron.tools.bench.sampling.models import BLOCK_CAUSAL, Recipe, train_or_find
from llada_megatron.tools.bench.sampling.speed_and_quality import SpeedPoint

if TYPE_CHECKING:
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel

THRESHOLDS = (0.99, 0.97, 0.95, 0.93, 0.91, 0.89, 0.87, 0.85, 0.8, 0.7)
COEFFICIENT, STEPS = 60.0, 120
"""The model is sure where it is right, so that the entropy weighs little: at 60 a third of the other loss."""
_FIRST_SEED = 5
"""No seed of the models that are continued."""
_TURN = 24
"""Prompts that a sampler answers before anything else is done."""


@dataclasses.dataclass(frozen=True)
class ConfidentRecipe(Recipe):
    """Fine-tuning by `objective.kind: sft`, whose answers are the texts of the language."""

    coefficient: float = 0.0

    @property
    def kind(self) -> str:
        """What its name begins with."""
        return "confident" if self.coefficient else "continued"

    @property
    def objective(self) -> FineTuningConfig:
        """That of the product."""
        return FineTuningConfig(
            kind="sft",
            block_size=self.block_size,
            normalization="answer_length",
            confidence_coefficient=self.coefficient,
        )


def recipe(coefficient: float, seed: int, steps: int) -> ConfidentRecipe:
    """The continuation of the block-causal model; `seed` counts from 0."""
    return ConfidentRecipe(
        steps=steps,
        learning_rate=3e-4,
        block_size=BLOCK_CAUSAL.block_size,
        parent=BLOCK_CAUSAL,
        seed=_FIRST_SEED + seed,
        edited_sequences=0.0,
        coefficient=coefficient,
    )


def run(
    models: Path, seeds: int, steps: int, coefficient: float, prompts: int, equal: float, goal: float
) -> list[Claim]:
    """Train or find both continuations of every seed in the folder `models`, let them answer, and print the points.

    Args:
        prompts: texts to be continued.
        equal: difference of two accuracies that count as equal.
        goal: of the mean over seeds of how much faster confidence makes the sampler.
    """
    ratios = []
    for seed in range(seeds):
        arms = [points_of(recipe(each, seed, steps), models, prompts) for each in (0.0, coefficient)]
        print(table(seed, *arms), end="\n\n", flush=True)
        ratios.append(speed_ratio(*arms, equal))
    return claims(ratios, equal, goal)


def points_of(recipe: ConfidentRecipe, models: Path, prompts: int) -> list[SpeedPoint]:
    """What a model does at each threshold."""
    from llada_megatron.llada_moe.config.layout import LayoutConfig
    from llada_megatron.parallel.checkpoint.loaded_model import load_checkpoint
    from llada_megatron.tools.bench.measurement import single_process

    path = train_or_find(models, recipe)
    with single_process():
        loaded = load_checkpoint(path, LayoutConfig())
        return [_point(loaded, recipe, prompts, threshold) for threshold in THRESHOLDS]


def _point(loaded: LoadedModel, recipe: ConfidentRecipe, prompts: int, threshold: float) -> SpeedPoint:
    ours, settings = OurSamplers({"block-causal": loaded}, recipe.new_tokens), {"schedule.threshold": f"{threshold:g}"}
    candidate = ours.candidate(PresetOnModel("llada2", "block-causal"), overrides=settings)
    asked = [recipe.language.held_out(number).prompt for number in range(prompts)]
    figures = measure([candidate], asked, recipe.language, 1, _TURN, quiet=True)[candidate.name]
    message(f"{recipe.kind}, threshold {threshold:g}: {figures.right:.3f} right")
    return SpeedPoint.of(figures, f"{threshold:g}")


def claims(ratios: Sequence[float], equal: float, goal: float) -> list[Claim]:
    """The mean over seeds against its goal, and its spread."""
    error = statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.nan
    what = (
        f"tokens per forward pass with confidence against without, where at most {100 * equal:g} points fewer "
        f"sentences are right than at best without, mean of {len(ratios)} seeds"
    )
    return [
        at_least(what, statistics.mean(ratios), "x", goal),
        reported("its standard error over seeds", error, "x"),
        *(reported(f"seed {seed}", each, "x") for seed, each in enumerate(ratios)),
    ]


def table(seed: int, without: Sequence[SpeedPoint], confident: Sequence[SpeedPoint]) -> str:
    """A line for each threshold."""
    lines = [
        f"seed {seed}     without confidence         with",
        "threshold  tokens/forward  right   tokens/forward  right",
    ]
    lines += [
        f"{a.settings:>9}  {a.tokens_per_forward:14.2f}  {100 * a.accuracy:5.1f}   {b.tokens_per_forward:14.2f}  "
        f"{100 * b.accuracy:5.1f}"
        for a, b in zip(without, confident, strict=True)
    ]
    return "\n".join(lines)
