"""`python -m benchmarks.sample_peers`: other projects' samplers take part in `llada bench sample`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sample_peers
from benchmarks.command import main
from llada_megatron.llada_moe.sampling.presets import PRESETS
from llada_megatron.tools.bench.sampling import models
from llada_megatron.tools.bench.sampling.candidates import DUAL, LLADA, WHOLE
from tests.benchmarks.clones import write_clones
from tests.tools.bench.sampling.small_models import rows, use_small_models

ROOT = Path(__file__).resolve().parents[2]


def test_every_preset_and_peer_is_in_the_table_and_the_picture(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    use_small_models(monkeypatch)
    plot = tmp_path / "pareto.png"
    clones = write_clones(tmp_path)
    options = ["--models", tmp_path / "models", "--prompts", 1, "--rounds", 1, "--peers", clones, "--plot", plot]
    assert main("sample", sample_peers, [*map(str, options), "--json"]) == 0
    said = capsys.readouterr()
    names = rows(said.out)
    assert set(PRESETS) - {"llada2.2"} <= set(names) and "skipped" not in said.err
    edited = {f"llada2.2 (editing){end}" for end in ("", ", no editor")}  # the others have no token to delete
    assert edited <= set(names) and "llada2.2" not in names
    both = {name for name, preset in PRESETS.items() if preset.causal is None}
    assert {f"{name} (block-causal)" for name in both} <= set(names)
    assert {"LLaDA's generate.py", "Fast-dLLM's own: dual cache", LLADA.name + WHOLE, DUAL.name + WHOLE} <= set(names)
    assert plot.read_bytes().startswith(b"\x89PNG") and str(plot) in said.err
    result = json.loads(said.out.splitlines()[-1])
    claims = result["claims"]
    assert result["benchmark"] == "sample"
    assert any("as fast as LLaDA's generate.py" in claim["claim"] and claim["goal"] == ">= 20" for claim in claims)
    goals = [claim["goal"] for claim in claims]
    assert goals.count("<= 64") == 1 and goals.count("<= 0.65") == 1 and goals.count(">= 1") == 5
    stops = [claim for claim in claims if "up to the end of text" in claim["claim"]]
    assert len(stops) == 2 and all(claim["value"] == 1.0 for claim in stops)


def test_a_missing_clone_is_said_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "train_or_find", None)  # would fail if it were called
    assert main("sample", sample_peers, ["--peers", str(tmp_path)]) == 1
    assert "git clone https://github.com/NVlabs/Fast-dLLM" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["chaos", "sample_peers"])
def test_a_command_explains_itself_in_a_checkout(name):
    command = [sys.executable, "-m", f"benchmarks.{name}", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m benchmarks.{name} ") and "--json" in done.stdout
