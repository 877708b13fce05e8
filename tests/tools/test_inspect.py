"""`llada inspect`: the resolved configuration, its parameters, what each rank holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from llada_megatron import cli
from llada_megatron.llada_moe.config import load_run
from llada_megatron.tools.inspect import spans

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def inspect(capsys, *words: str) -> tuple[str, dict]:
    assert cli.main(["inspect", *words, "--json"]) == 0
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_a_model_by_name(capsys):
    out, report = inspect(capsys, "llada2-flash")
    assert report["parameters"] == 102_889_705_216
    assert report["trainable"] == 102_889_697_280
    assert sum(report["parts"].values()) == report["parameters"]
    assert "102,889,705,216" in out and "hidden_size: 4096" in out and "ranks" not in report


def test_a_run_shows_what_each_rank_holds(capsys):
    path = str(CONFIGS / "runs/demo.yaml")
    out, report = inspect(capsys, path)
    assert [(share["ranks"], share["experts"]) for share in report["ranks"]] == [
        ([0], [0, 1, 2, 3]),
        ([1], [4, 5, 6, 7]),
    ]
    shared = report["parameters"] - report["parts"]["experts"]
    assert {share["parameters"] for share in report["ranks"]} == {shared + report["parts"]["experts"] // 2}
    resolved = yaml.safe_load(out[: out.index("\nparameters\n")])
    assert resolved == report["config"] and resolved["model"]["num_layers"] == load_run(path).model.num_layers


def test_overrides_and_a_large_layout_in_one_line_per_stage(capsys):
    out, report = inspect(capsys, str(CONFIGS / "runs/llada2-flash-pretrain.yaml"), "layout.data_parallel=8")
    assert report["world_size"] == 32 and len(report["ranks"]) == 32
    assert "  0-7    0   0-7  embedding, 0-1, 8-9, 16-17, 25-26  32 each  3,973,122,048" in out
    assert report["ranks"][-1]["layers"] == [6, 7, 14, 15, 23, 24, 31] and report["ranks"][-1]["output"]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([0], "0"), ([0, 1, 2], "0-2"), ([0, 2, 3], "0, 2-3"), ([0, 2, 4, 6, 8], "0, 2, 4, 6, … (5)"), ([], "")],
)
def test_spans(numbers, text):
    assert spans(numbers) == text


def test_a_run_by_name(capsys):
    assert inspect(capsys, "demo")[1] == inspect(capsys, str(CONFIGS / "runs/demo.yaml"))[1]


def test_of_a_model_and_a_run_with_one_name_the_model_is_shown_and_that_is_said(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-moe.yaml").write_text((CONFIGS / "runs/demo.yaml").read_text())
    assert cli.main(["inspect", "tiny-moe"]) == 0
    said = capsys.readouterr()
    assert "'tiny-moe' is the name of a model and of a run; this is the model, and tiny-moe.yaml is the run" in said.err
    assert "layout:" not in said.out
    assert "ranks" in inspect(capsys, "tiny-moe.yaml")[1]  # the path stands for one of them


def test_a_name_that_is_like_no_other_lists_the_known_ones(capsys):
    assert cli.main(["inspect", "qqqq"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no model or run 'qqqq'; models: llada-8b, ")
    assert "; runs: ar-to-diffusion, demo, " in said


def test_a_wrong_name_is_refused(capsys):
    assert cli.main(["inspect", "llada2-flahs"]) == 2
    assert capsys.readouterr().err == "error: no model or run 'llada2-flahs'; did you mean 'llada2-flash'?\n"
