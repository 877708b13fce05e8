"""`llada sample` and the demo from the command line: the same text from every layout, infilling, wrong input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from llada_megatron import cli
from llada_megatron.launch import demo, demo_report
from llada_megatron.parallel.evaluation.assessment import Assessment, Baselines, TextSpan
from tests.corpora import write_texts

RUN = """
model: {base: tiny-moe-softmax, vocab_size: 400}
training: {steps: 4, sequence_length: 32, global_batch_size: 8, precision: fp32}
data: {sets: [{path: data/corpus}], validation_fraction: 0.2}
optimizer: {learning_rate: {peak: 3e-3}}
layout: {data_parallel: 2, expert_parallel: 2}
checkpoint: {interval: 2, keep_last: 2}
logging: {interval: 2, tensorboard: false}
output_dir: out
"""
Here = Callable[..., tuple[int, str, str]]
LAYOUTS = {
    "pipeline": ["layout.pipeline_parallel=2"],
    "tensor": ["layout.tensor_parallel=2", "layout.sequence_parallel=true"],
}


def program(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


def llada(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return program("llada_megatron.cli", *arguments, cwd=cwd)


DEMO = ("--config", "run.yaml", "--corpus", "texts", "--sequences", "12")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which a small demo has run; its output in demo.stdout and demo.stderr."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "run.yaml").write_text(RUN)
    (folder / "texts").mkdir()
    write_texts(folder / "texts", 20)
    done = program("llada_megatron.launch.demo", *DEMO, cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "demo.stdout").write_text(done.stdout)
    (folder / "demo.stderr").write_text(done.stderr)
    return folder


@pytest.fixture
def here(folder, capsys, monkeypatch) -> Here:
    """Calls a `main` in this process and in the folder of the demo."""
    monkeypatch.chdir(folder)

    def call(main: Callable[[list[str]], int], *arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        return main(list(arguments)), *capsys.readouterr()

    return call


def samples_of(code: int, out: str, err: str) -> dict:
    assert code == 0, err
    assert "Warning" not in err
    values = json.loads(out)
    for sample in values["samples"]:
        assert sample.pop("seconds") > 0
    return values


def test_the_demo_leaves_a_report(folder):
    report = json.loads((folder / "out/report.json").read_text())
    for key in (
        "bits_per_byte",
        "unigram_bits_per_byte",
        "bigram_bits_per_byte",
        "zlib_bits_per_byte",
        "infill_accuracy",
        "majority_share",
        "seconds",
        "peak_memory_gb",
    ):
        assert report[key] > 0 or key == "infill_accuracy"
    assert report["validation_tokens"] == 12 * 32
    assert report["near_duplicate_share"] == 0.0
    assert [sum(counts) for counts in report["expert_tokens"].values()] == [12 * 32 * 2] * 4
    assert len(report["examples"]) == 3
    assert set(report["seconds_by_phase"]) == {"prepare", "train", "evaluate"}
    printed = (folder / "demo.stdout").read_text()
    for text in (
        "bits per byte",
        "≤ ",
        "unigrams",
        "bigrams",
        "before",
        "after",
        "layer  4",
        "out/tensorboard",
        "out/report.md",
    ):
        assert text in printed
    assert "# Demo" in (folder / "out/report.md").read_text()


def test_a_second_demo_reuses_what_exists(folder, here):
    before = json.loads((folder / "out/report.json").read_text())
    code, _, err = here(demo.main, *DEMO, "--require")
    assert code == 1
    assert "goal missed: bits per byte are" in err  # six steps learn next to nothing
    assert "corpus exists" in err
    assert "finished earlier" in err
    after = json.loads((folder / "out/report.json").read_text())
    for key in ("bits_per_byte", "infill_accuracy", "expert_tokens", "examples"):
        assert after[key] == before[key]
    assert after["seconds_by_phase"]["train"] == before["seconds_by_phase"]["train"]


def test_a_demo_of_another_corpus_is_not_mixed_up_with_this_one(here):
    code, _, err = here(demo.main, "--config", "run.yaml", "--corpus", "elsewhere")
    assert code == 2
    assert "prepared from texts, not elsewhere" in err


def test_a_checkpoint_of_any_layout_gives_the_same_text(folder, here):
    texts = []
    for name, axes in {"one": [], **LAYOUTS}.items():
        common = [
            "training.steps=1",
            "training.micro_batch_size=4",
            "layout.data_parallel=1",
            "layout.expert_parallel=1",
        ]
        done = llada("train", "run.yaml", *common, f"output_dir={name}", *axes, cwd=folder)
        assert done.returncode == 0, done.stderr
        arguments = ["--prompt", "abc de", "--max-new-tokens", "12", "--temperature", "1", "--seed", "3"]
        texts.append(samples_of(*here(cli.main, "sample", name, *arguments, "--json"))["samples"])
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.parametrize(
    "layout",
    [
        ["tensor_parallel=2", "pipeline_parallel=2"],
        ["expert_parallel=2"],
        ["expert_parallel=2", "expert_tensor_parallel=2"],
    ],
    ids=" ".join,
)
def test_sampling_under_another_layout_gives_the_same_text(folder, here, layout):
    arguments = [
        "--prompt",
        "abc",
        "--prompt",
        "de fgh",
        "--max-new-tokens",
        "10",
        "--temperature",
        "1",
        "--steps",
        "5",
    ]
    alone = samples_of(*here(cli.main, "sample", "out", *arguments, "--json"))
    done = llada("sample", "out", *arguments, *(f"layout.{axis}" for axis in layout), "--json", cwd=folder)
    spread = samples_of(done.returncode, done.stdout, done.stderr)
    assert alone["samples"] == spread["samples"]
    assert alone["forwards"] == spread["forwards"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["nowhere", "--prompt", "a"], 1, "there is no checkpoint at nowhere"),
        (["texts", "--prompt", "a"], 1, "no checkpoint in texts"),
        (["out", "--prompt", "a", "--infill"], 2, "no <mask> to fill in 'a'"),
        (["out", "--prompt", "a", "--steps", "0"], 2, "--steps 0: at least 1"),
        (["out", "--prompt", "a", "--tokenizer", "other.model"], 1, "not at other.model"),
        (["out", "--prompt", "a", "layout.tensor_parallel=3"], 2, "3 does not divide num_attention_heads 4"),
        (["out", "--prompt", "a", "layout.context_parallel=2"], 2, "layout.context_parallel=2: sampling takes"),
        (["out", "--prompt", "a", "--infill", "layout.tensor_parallel=2"], 2, "no <mask> to fill in 'a'"),
    ],
)
def test_wrong_input_is_one_message(here, arguments, code, text):
    ended, out, err = here(cli.main, "sample", *arguments)
    assert ended == code
    assert text in err
    assert "Traceback" not in err
    assert out == ""


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(folder, here):
    shutil.copytree(folder / "out/checkpoints", folder / "damaged/checkpoints")
    part = next((folder / "damaged/checkpoints/step-00000004").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-10])
    code, _, err = here(cli.main, "sample", "damaged", "--prompt", "a", "--max-new-tokens", "2")
    assert code == 0, err
    assert "passed over a damaged checkpoint" in err
    assert "step-00000002" in err


def test_report_by_hand():
    example = [TextSpan("for "), TextSpan("i in", "j in", tokens=2, right=1), TextSpan(" x:")]
    result = Assessment(1.5, True, Baselines(3.0, 1.2, 2.0), 0.31, 0.1, 0.0, 1, 20, {1: [10, 30, 0, 0]}, [example])
    assert result.gain == 0.5
    assert demo_report.missed_goals(result) == []
    assert demo_report.before(example) == "for «??» x:"
    assert demo_report.after(example) == "for «j in» x:"
    assert demo_report.original(example) == "for i in x:"
    paths = demo_report.ResultPaths("c", "t", "r")
    text = demo_report.as_text(result, {"train": 61.0}, 1.25, paths, lambda text, code: text)
    bounds = ("≤ 1.500 (upper bound)", "50.0% below unigrams", "25.0% ABOVE bigrams", "zlib 2.000")
    for part in (*bounds, "3.1 times", "1 of 2 tokens", "max/mean 3.00, dead 2", "1:01 of work"):
        assert part in text
    exact = replace(result, is_bound=False, bits_per_byte=1.1)
    text = demo_report.as_text(exact, {"train": 61.0}, 1.25, paths, lambda text, code: text)
    assert "1.100 (exact)" in text
    assert "8.3% below bigrams" in text


@pytest.mark.parametrize("change", [{"bits_per_byte": 2.3}, {"bits_per_byte": float("nan")}, {"majority_share": 0.2}])
def test_a_missed_goal_of_the_demo_is_named(change):
    result = Assessment(1.5, True, Baselines(3.0, 1.2, 2.0), 0.31, 0.1, 0.0, 1, 20, {}, [])
    assert len(demo_report.missed_goals(replace(result, **change))) == 1
