"""`llada bench cap --language`: what it concludes, and both continuations at toy size."""

import dataclasses
import math

import pytest

from llada_megatron.tools.bench import cap_language
from llada_megatron.tools.bench.equal_accuracy import speed_ratio
from llada_megatron.tools.bench.sampling.models import Recipe
from llada_megatron.tools.bench.sampling.speed_and_quality import SpeedPoint
from tests.launch.sampling.checkpoints import run_cli


def points(*pairs):
    return [SpeedPoint(speed, accuracy, None, "0.9") for speed, accuracy in pairs]


@pytest.mark.parametrize(
    ("confident", "ratio"),
    [
        (points((2.5, 0.97), (9.0, 0.9)), 1.25),  # the faster one is not equal any more
        (points((1.0, 1.0)), 0.5),
        (points((9.0, 0.5)), 0.0),
    ],
)
def test_speeds_are_compared_at_equal_accuracy(confident, ratio):
    without = points((1.0, 0.98), (2.0, 0.97), (5.0, 0.6))
    assert speed_ratio(without, confident, 0.02) == pytest.approx(ratio)


def test_the_mean_over_seeds_is_judged_with_its_error():
    mean, error, *seeds = cap_language.claims([1.0, 1.2], 0.02, 1.05)
    assert (mean.value, mean.holds) == (pytest.approx(1.1), True) and error.value == pytest.approx(0.1)
    assert [claim.value for claim in seeds] == [1.0, 1.2]
    assert math.isnan(cap_language.claims([1.2], 0.02, 1.05)[1].value)


def test_both_continuations_begin_with_the_same_model_and_texts(tmp_path, capsys, monkeypatch):
    small = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 32, "heads": 2, "sequences": 2, "warmup_steps": 1}
    parent = Recipe(steps=1, learning_rate=1e-3, block_size=32, **small)
    monkeypatch.setattr(cap_language, "BLOCK_CAUSAL", parent)
    monkeypatch.setattr(cap_language, "THRESHOLDS", (0.9, 0.5))
    made = cap_language.recipe
    monkeypatch.setattr(cap_language, "recipe", lambda *arguments: dataclasses.replace(made(*arguments), **small))
    words = ("bench", "cap", "--language", "--steps", 2, "--prompts", 1, "--models", tmp_path, "--coefficient", 3)
    code, out, err = run_cli(capsys, *words)
    assert code == 0, err
    assert "seed 0" in out and "mean of 1 seeds" in out
    names = sorted(path.name.partition("-")[0] for path in tmp_path.iterdir())
    assert names == ["block", "confident", "continued"]
    without, confident = (cap_language.recipe(each, 0, 2) for each in (0.0, 3.0))
    assert without.seed == confident.seed and without.parent is confident.parent is parent
    assert confident.objective.confidence_coefficient == 3.0 and without.objective.confidence_coefficient == 0.0


@pytest.mark.parametrize(
    ("option", "text"), [("--seeds", "--seeds 0: at least 1"), ("--steps", "--steps 0: at least 1")]
)
def test_wrong_input(capsys, option, text):
    code, _, err = run_cli(capsys, "bench", "cap", "--language", option, 0)
    assert code == 2 and text in err
