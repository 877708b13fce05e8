"""The examples run as their text says."""

import dataclasses
import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from llada_megatron.llada_moe.config import load_run
from llada_megatron.parallel.training.callbacks import Callbacks
from tests.launch.sampling.checkpoints import checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"


def _module(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_run_file_loads_and_is_listed():
    assert load_run(EXAMPLES / "run.yaml").data.sets[0].path == "data/python"
    listed = re.findall(r"\]\(([^/)#]+)\)", (EXAMPLES / "README.md").read_text())
    assert set(listed) == {path.name for path in EXAMPLES.glob("*.*")} - {"README.md"}


def test_gaps_are_filled(tmp_path, capsys):
    _module("fill_gaps").main(str(checkpoint(tmp_path)), "for i in <mask:2>:")
    *steps, text = capsys.readouterr().out.split("\n")[:-1]
    assert len([line for line in steps if line.startswith("step ")]) == 2
    assert text.startswith("for i in ")


def test_a_callback_follows_a_run(monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    run = load_run(EXAMPLES / "run.yaml", ["logging.callbacks=[print_metrics:PrintLoss]"])
    told = Callbacks(dataclasses.replace(run, output_dir="runs/x"))
    told.start(3)
    told.log([{"step": 4, "loss": 2.5}])
    told.end()
    assert capsys.readouterr().err == "following runs/x from step 3\nstep 4: loss 2.5000\n"


@pytest.mark.parametrize("recipe", ["Dockerfile", "llada.def"])
def test_recipes_copy_what_there_is(recipe):
    """An image cannot be built in a test; at least every file that goes into one exists."""
    root, text = EXAMPLES.parent, (EXAMPLES.parent / "containers" / recipe).read_text()
    copied = re.findall(r"^COPY (.+) \S+$|^    (?!cd )(\S+) /opt/llada", text, re.MULTILINE)
    names = [name for pair in copied for group in pair for name in group.split()]
    assert {"src", "configs", "pyproject.toml", "constraints"} <= set(names)
    assert all((root / name).exists() for name in names)
    assert "constraints/gpu.txt" in text and (root / "constraints/gpu.txt").is_file()
    assert "--no-build-isolation" in text  # else the extension is built for another torch than the installed one


def test_versions_for_gpus_are_those_of_the_tests_but_for_torch():
    """And every part of Transformer Engine is pinned to one version, which the extra accepts."""
    root = EXAMPLES.parent

    def pins(name):
        text = (root / "constraints" / name).read_text()
        return dict(re.findall(r"^([a-z][\w-]*)==(\S+)$", text.split("# development")[0], re.MULTILINE))

    gpu, tested = pins("gpu.txt"), pins("py312.txt")
    engine = {gpu.pop(name) for name in list(gpu) if name.startswith("transformer-engine")}
    assert gpu.keys() == tested.keys() and {name for name in gpu if gpu[name] != tested[name]} <= {"torch"}
    assert len(engine) == 1
    extra = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"][0]
    requirement = Requirement(extra)
    assert requirement.specifier.contains(engine.pop()) and not requirement.specifier.contains("2.14.1")
