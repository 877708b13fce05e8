"""`llada bench sample`: everybody takes part, times and counts are those of the contenders, claims have their goals."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time

import pytest

from llada_megatron.llada_moe.errors import ConfigError, ResourceError
from llada_megatron.llada_moe.sampling.presets import PRESETS
from llada_megatron.tools.bench import sample
from llada_megatron.tools.bench.sampling import models, packets
from llada_megatron.tools.bench.sampling.contenders import DUAL, LLADA, WHOLE, Contender
from llada_megatron.tools.bench.sampling.language import Language, Score
from llada_megatron.tools.bench.sampling.measuring import Figures, measure, same_tokens, table
from llada_megatron.tools.bench.sampling.models import Recipe
from llada_megatron.tools.bench.sampling.peers import Generated, Work
from llada_megatron.tools.bench.sampling.picture import Point, draw, front, require_drawing
from tests.tools.bench.sampling.clones import write_clones

LANGUAGE = Language(
    tail_length=1, tail_choices=40, prompt_sentences=(1, 2), response_sentences=(2, 3), longest_title=3, title_words=20,
    vocab_size=256,
)  # fmt: skip
TINY = Recipe(steps=1, learning_rate=1e-2, language=LANGUAGE, new_tokens=12, num_layers=2, hidden_size=32,
              ffn_hidden_size=48, heads=2, sequences=2, warmup_steps=0)  # fmt: skip
CAUSAL = dataclasses.replace(TINY, block_size=8, parent=TINY)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def arguments(directory, monkeypatch):
    monkeypatch.setattr(models, "RECIPES", {"bidirectional": TINY, "block-causal": CAUSAL})
    monkeypatch.setattr(packets, "LAYOUTS", {"TP2": packets.LAYOUTS["TP2"]})

    def parse(*words):
        parser = argparse.ArgumentParser()
        sample.add_arguments(parser)
        return parser.parse_args(["--models", str(directory), "--prompts", "2", "--rounds", "1", *map(str, words)])

    return parse


def by_goal(claims):
    return {claim.goal: claim for claim in claims if claim.goal != "reported"}


def rows(text):
    return [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("|")][2:]


def test_every_preset_and_peer_is_in_the_table_and_the_picture(arguments, tmp_path, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    plot = tmp_path / "pareto.png"
    clones = write_clones(tmp_path)
    claims = sample.run(arguments("--peers", clones, "--plot", plot, "--prompts", 1))
    said = capsys.readouterr()
    names = rows(said.out)
    cannot = {"llada2.2"}  # these models have no tokens to delete and insert
    assert set(PRESETS) - cannot <= set(names) and not cannot & set(names)
    assert "llada2.2 is left out: editor levenshtein: the model names no model.delete_token_id" in said.err
    both = {name for name, preset in PRESETS.items() if preset.causal is None}
    assert {f"{name} (block-causal)" for name in both} <= set(names)
    assert {"LLaDA's generate.py", "Fast-dLLM's own: dual cache", LLADA.name + WHOLE, DUAL.name + WHOLE} <= set(names)
    assert plot.read_bytes().startswith(b"\x89PNG") and str(plot) in said.err
    assert any("as fast as LLaDA's generate.py" in claim.claim and claim.goal == ">= 20" for claim in claims)
    goals = [claim.goal for claim in claims]
    assert goals.count("<= 64") == 1 and goals.count("<= 0.65") == 1 and goals.count(">= 1") == 4
    stops = [claim for claim in claims if "up to the end of text" in claim.claim]
    assert len(stops) == 2 and all(claim.value == 1.0 for claim in stops)


def test_a_few_presets_without_peers_have_our_own_reference(arguments, capsys):
    claims = sample.run(arguments("--presets", "fast-dllm, llada2", "--batch-size", 2))
    said = capsys.readouterr()
    names = [name for name in rows(said.out) if ", batch" not in name]
    assert sorted(names) == sorted(["fast-dllm", "fast-dllm (block-causal)", "llada2", LLADA.name + WHOLE])
    goals = by_goal(claims)
    assert set(goals) == {">= 20", "<= 64"} and LLADA.name + WHOLE in goals[">= 20"].claim
    assert 12 <= goals["<= 64"].value <= 64 and goals["<= 64"].value % 4 == 0
    assert "minutes" not in said.err or "trained first" in said.err


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
    with pytest.raises(ResourceError, match="git clone https://github.com/NVlabs/Fast-dLLM"):
        sample.run(arguments("--peers", tmp_path))
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    with pytest.raises(ResourceError, match="pip install matplotlib"):
        sample.run(arguments("--plot", tmp_path / "figure.png"))


def test_a_picture_needs_its_folder(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ResourceError, match="there is no folder"):
        require_drawing(tmp_path / "nowhere" / "figure.png")


def test_numbers_below_one_are_refused(arguments):
    with pytest.raises(SystemExit):
        arguments("--prompts", "0")


def answer(tokens, **work):
    return Generated(tokens, Work(**work))


def test_the_least_time_of_each_turn_counts_and_everybody_begins_once():
    order, calls = [], {"slow": 0, "quick": 0}

    def contender(name, seconds):
        def write(prompts):
            order.append(name)
            calls[name] += 1
            end = time.process_time() + (seconds if calls[name] > 2 else 5 * seconds)
            while time.process_time() < end:
                pass
            return [answer([1], forwards=3, positions=20, logit_rows=5) for _ in prompts]

        return Contender(name, write)

    prompts = [LANGUAGE.held_out(number).prompt for number in range(4)]
    figures = measure([contender("slow", 0.02), contender("quick", 0.004)], prompts, LANGUAGE, rounds=3, together=2)
    assert order[:4] == ["slow", "quick", "quick", "slow"]
    assert figures["slow"].seconds == pytest.approx(0.01, rel=0.2)
    assert figures["quick"].seconds == pytest.approx(0.002, rel=0.2)
    assert (figures["slow"].forwards, figures["slow"].positions, figures["slow"].logit_rows) == (3, 20, 5)


def figures(name, seconds, answers, scores):
    return Figures(Contender(name, lambda prompts: []), seconds, answers, scores)


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
    claims = sample._speed_claims({LLADA.name + WHOLE: reference}, {}, [], reference)
    assert [claim.holds for claim in claims if claim.goal == ">= 20"] == [False]
