"""LLaDA's poem task of `examples/poems`: asked by lm_eval, and graded by the line that must stand in an answer."""

from __future__ import annotations

import importlib.util
import json
import runpy
from pathlib import Path

import pytest

from tests.launch.sampling.checkpoints import run_cli

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "poems"


def test_an_answer_is_right_if_the_line_stands_in_it():
    poem = {"first": "床前明月光", "second": "疑是地上霜"}
    names = runpy.run_path(str(FOLDER / "substring.py"))
    next_line, previous_line = names["next_line"], names["previous_line"]
    assert next_line(poem, ["下一句是：疑是地上霜。"]) == previous_line(poem, ["床前明月光"]) == {"contained": 1.0}
    assert next_line(poem, ["床前明月光"]) == previous_line(poem, ["疑是地上"]) == {"contained": 0.0}


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed (the extra eval)")
def test_both_tasks_are_asked(dense, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    poems = [{"first": "ab", "second": "cd"}, {"first": "e", "second": ""}]
    (tmp_path / "poem_data.json").write_text(json.dumps(poems))
    words = ("--tasks", "poem_next_line,poem_previous_line", "--task-folder", FOLDER, "--max-new-tokens", 2)
    code, out, err = run_cli(capsys, "eval", "harness", dense, *words, "--output", tmp_path / "out.json", "--json")
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])["results"]
    assert found["poem_next_line"]["contained,none"] >= 0.5, "an empty line stands in every answer"
    assert "contained,none" in found["poem_previous_line"]
    asked = json.loads((tmp_path / "out.json").read_text())["samples"]
    assert asked["poem_next_line"][0]["arguments"][0][0] == "ab的下一句是什么？ 直接输出句子即可。"
    assert asked["poem_previous_line"][0]["arguments"][0][0] == "cd的上一句是什么？ 直接输出句子即可。"
