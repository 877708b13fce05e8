"""`llada bench sample`: all presets take part, times and counts are the candidates', claims have their goals."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time

import pytest

from llada_megatron import cli
from llada_megatron.llada_moe.errors import ConfigError, ResourceError
from llada_megatron.llada_moe.sampling.presets import PRESETS
from llada_megatron.tools.bench import sample
from llada_megatron.tools.bench.sampling import models
from llada_megatron.tools.bench.sampling.candidates import LLADA, WHOLE, Candidate, Generated, PresetOnModel, Work
from llada_megatron.tools.bench.sampling.claims import speed_claims
from llada_megatron.tools.bench.sampling.figures import Figures, measure, same_tokens, table
from llada_megatron.tools.bench.sampling.language import Score
from llada_megatron.tools.bench.sampling.picture import Point, draw, front, require_drawing
from llada_megatron.tools.bench.sampling.speed_and_quality import (
    SpeedPoint,
    area_under_parallelism,
    pareto_front,
    speeds_of,
)
from tests.tools.bench.sampling.small_models import LANGUAGE, rows, use_small_models


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def arguments(directory, monkeypatch):
    use_small_models(monkeypatch)

    def parse(*words):
        parser = argparse.ArgumentParser()
        sample.add_arguments(parser)
        return parser.parse_args(["--models", str(directory), "--prompts", "2", "--rounds", "1", *map(str, words)])

    return parse


def by_goal(claims):
    return {claim.goal: claim for claim in claims if claim.goal != "reported"}


def test_a_few_presets_without_peers_have_our_own_reference(arguments, capsys):
    presets = "fast-dllm, llada2, self-speculation, autoregressive"
    claims = sample.run(arguments("--presets", presets, "--batch-size", 2, "--graphs"))
    said = capsys.readouterr()
    names = [name for name in rows(said.out) if ", batch" not in name]
    own = ["fast-dllm", "fast-dllm (block-causal)", "llada2", "llada2 (editing)", LLADA.name + WHOLE]
    own += ["self-speculation", "autoregressive"]
    assert sorted(names) == sorted(own)
    goals = by_goal(claims)
    same = next(claim for claim in claims if "same tokens as token-by-token greedy decoding" in claim.claim)
    assert same.goal == ">= 1" and same.holds
    assert set(goals) == {">= 20", "<= 64", ">= 1", ">= 2.5"} and LLADA.name + WHOLE in goals[">= 20"].claim
    assert 12 <= goals["<= 64"].value <= 64 and goals["<= 64"].value % 4 == 0
    fixed = [claim for claim in claims if "passes of fixed shape, run from Python, against ordinary" in claim.claim]
    assert [claim.goal for claim in fixed] == ["reported", ">= 1"] * 4 and all(claim.holds for claim in fixed[1::2])
    assert "minutes" not in said.err or "trained first" in said.err


def test_editing_is_compared_with_the_same_model_without_it(arguments, capsys):
    claims = sample.run(arguments("--presets", "llada2.2", "--batch-size", 1))
    said = capsys.readouterr()
    assert rows(said.out)[1:] and set(rows(said.out)) == {
        "llada2.2 (editing)",
        "llada2.2 (editing), no editor",
        LLADA.name + WHOLE,
    }
    assert "llada2.2 is skipped" not in said.err
    gained = [claim for claim in claims if claim.claim.startswith("llada2.2 (editing): ")]
    share, passes = (next(c.value for c in gained if words in c.claim) for words in ("gained by", "passes / those"))
    assert -1 <= share <= 1 and passes > 0


def test_every_preset_slower_and_faster(arguments, tmp_path, capsys):
    file = tmp_path / "speeds.json"
    sample.run(arguments("--presets", "llada, fast-dllm-dual", "--batch-size", 1, "--speeds", "--output", file))
    found = json.loads(file.read_text())
    samplers = {each["name"]: each for each in found["samplers"]}
    assert set(samplers) == {"llada", "llada (block-causal)", "fast-dllm-dual"}
    assert len(samplers["fast-dllm-dual"]["points"]) == 6 and len(samplers["llada"]["points"]) > 1
    for each in samplers.values():
        assert sum(point["published"] for point in each["points"]) == 1
        rates = [point["tokens_per_forward"] for point in each["points"]]
        assert rates == sorted(rates)
    assert "llada (block-causal)" in capsys.readouterr().out


def test_every_preset_has_its_speeds_or_none():
    for name in PRESETS:
        speeds = speeds_of(PresetOnModel(name, "block-causal"), 128)
        assert (len(speeds) >= 3) != (name in ("self-speculation", "autoregressive")), name


def test_the_area_under_accuracy_and_parallelism_is_that_of_the_formula():
    points = [SpeedPoint(*each, None) for each in ((1.0, 0.8), (4.0, 0.76), (2.0, 0.8), (8.0, 0.7), (9.0, 0.8))]
    weights = [y * min(math.exp(-3 * (1 - y / 80)), 1) for y in (80, 80, 76)]
    expected = 80 + (weights[0] + weights[1]) / 2 + 2 * (weights[1] + weights[2]) / 2  # the rest is beyond 75
    assert area_under_parallelism(points, 80.0) == pytest.approx(expected)
    assert area_under_parallelism(points[:1], 100.0) == pytest.approx(80)
    assert area_under_parallelism([SpeedPoint(0.0, 0.0, None)], 100.0) is None
    assert [point.tokens_per_forward for point in pareto_front(points)] == [9.0]


def test_groups_in_flight_keep_the_stages_of_a_pipeline_busy(arguments):
    claims = sample.run(arguments("--presets", "fast-dllm", "--pipeline", 2, "--batch-size", 1, "--prompts", 1))
    busy = [claim for claim in claims if "stages compute" in claim.claim]
    assert len(busy) == 4 and all(0 < claim.value <= 100 for claim in busy)
    assert any(claim.goal == ">= 1.2" for claim in claims)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--presets", "fast-dllm-duel"],
            "no preset 'fast-dllm-duel'; did you mean 'fast-dllm-dual'.*there are llada,",
        ),
        (["--pipeline", "3"], "--pipeline 3: the small model's 2 layers make 2 stages"),
        (["--plot", "figure.nothing"], r"figure.nothing: no kind of picture.*\.png"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_trained(arguments, monkeypatch, words, message):
    if words[0] == "--plot":
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(models, "train_or_find", None)  # would fail if it were called
    with pytest.raises(ConfigError, match=message):
        sample.run(arguments(*words))


def test_missing_things_are_said_with_what_to_run(arguments, monkeypatch, tmp_path):
    monkeypatch.setattr(models, "train_or_find", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(ResourceError, match="pip install matplotlib"):
        sample.run(arguments("--plot", tmp_path / "figure.png"))


def test_the_comparison_with_other_projects_is_another_command_now(capsys):
    assert cli.main(["bench", "sample", "--peers", "my clones", "--json"]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "`python -m benchmarks.sample_peers --peers 'my clones'`" in said.err
    assert json.loads(said.out)["exit_code"] == 2


def test_a_picture_needs_its_folder(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ResourceError, match="there is no folder"):
        require_drawing(tmp_path / "nowhere" / "figure.png")


def test_numbers_below_one_are_refused(arguments):
    with pytest.raises(SystemExit):
        arguments("--prompts", "0")


def answer(tokens, **work):
    return Generated(tokens, Work(**work))


def test_the_least_time_of_each_turn_counts_and_each_is_first_once():
    order, calls = [], {"slow": 0, "quick": 0}

    def candidate(name, seconds):
        def write(prompts):
            order.append(name)
            calls[name] += 1
            end = time.process_time() + (seconds if calls[name] > 2 else 5 * seconds)
            while time.process_time() < end:
                pass
            return [answer([1], forwards=3, positions=20, logit_rows=5) for _ in prompts]

        return Candidate(name, write)

    prompts = [LANGUAGE.held_out(number).prompt for number in range(4)]
    figures = measure([candidate("slow", 0.02), candidate("quick", 0.004)], prompts, LANGUAGE, rounds=3, together=2)
    assert order[:4] == ["slow", "quick", "quick", "slow"]
    assert figures["slow"].seconds == pytest.approx(0.01, rel=0.2)
    assert figures["quick"].seconds == pytest.approx(0.002, rel=0.2)
    assert (figures["slow"].forwards, figures["slow"].positions, figures["slow"].logit_rows) == (3, 20, 5)


def figures(name, seconds, answers, scores):
    return Figures(Candidate(name, lambda prompts: []), seconds, answers, scores)


def test_a_row_of_the_table():
    reference = figures(
        "reference", 2.0, [answer([1], forwards=128, positions=9, logit_rows=9)], [Score(1.0, True, 64)]
    )
    answers = [answer([1], forwards=n, positions=1000 * n, logit_rows=50 * n) for n in (10, 30)]
    each = figures("each", 0.1, answers, [Score(0.5, False, 60), Score(1.0, True, 100)])
    lines = table([reference, each], reference).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["each", "0.100", "20.0", "20.0", "0.250", "20,000", "1,000", "0.750", "0.50"]
    assert len({len(line) for line in lines}) == 1


def test_the_same_tokens_up_to_the_end():
    ours = figures("ours", 1.0, [answer([1, 2, 9, 9]), answer([1, 2, 3, 4])], [])
    theirs = figures("theirs", 1.0, [answer([1, 2, 9, 5]), answer([1, 2, 3, 5])], [])
    assert same_tokens(ours, theirs) == 0.0
    assert same_tokens(ours, theirs, end=9) == 0.5


def test_the_front_holds_what_nothing_beats_in_both_respects(tmp_path):
    points = [
        Point("slow and best", 1.0, 0.9, True),
        Point("beaten", 0.5, 0.6, False),
        Point("quick", 0.2, 0.7, False),
        Point("quick and worse", 0.2, 0.6, False),
        Point("quicker", 0.1, 0.5, False),
    ]
    assert [point.name for point in front(points)] == ["quicker", "quick", "slow and best"]
    pytest.importorskip("matplotlib")
    draw(tmp_path / "a.svg", points)
    text = (tmp_path / "a.svg").read_text()
    assert all(point.name in text for point in points)


def test_no_preset_of_equal_quality_misses_the_goal():
    reference = figures(LLADA.name + WHOLE, 2.0, [answer([1])], [Score(1.0, True, 1)])
    found = speed_claims({LLADA.name + WHOLE: reference}, {}, [], reference)
    assert [claim.holds for claim in found if claim.goal == ">= 20"] == [False]
