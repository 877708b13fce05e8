"""What the guides and the help texts tell a reader to type is accepted: parsed all, and run as far as it is cheap."""

from __future__ import annotations

import argparse
import importlib.util
import re
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from llada_megatron import cli
from llada_megatron.launch import demo
from llada_megatron.launch.cluster.config import load_cluster
from llada_megatron.launch.sampling import options
from llada_megatron.llada_moe.config import load_model, load_run
from llada_megatron.llada_moe.config.named import MODELS, RUNS
from llada_megatron.llada_moe.objectives.joint import JointConfig
from llada_megatron.llada_moe.sampling.presets import PRESETS, choose
from llada_megatron.tools import bench, prepare
from llada_megatron.tools.convert import parse_layout, parse_size
from tests.documented import ROOT, Documented, commands

FOUND = commands()
PLACEHOLDERS = {"N": "8", "ID": "8", "JOB": "4711"}
OWN_RUN, OWN_CLUSTER = "small-diffusion", "dgx-h100"
"""What stands for a reader's own file."""


def parsed(each: Documented) -> argparse.Namespace:
    """As `llada` parses it; argparse says what it does not understand, and exits."""
    _, name, *rest = (PLACEHOLDERS.get(word, word) for word in each.words)
    module = importlib.import_module(cli.COMMANDS[name][0])
    rest = [word for word in rest if word not in cli.COMMON_OPTIONS]
    return cli._parse(cli.command_parser(name, module), rest)


def of(*names: str) -> list[Documented]:
    return [each for each in FOUND if not each.named_only and each.words[0] == "llada" and each.words[1] in names]


def test_the_guides_and_every_help_text_were_read():
    places = {each.where for each in FOUND}
    assert len(FOUND) > 80
    assert {"README.md", "quick-start.md", "train.md", "cluster.md", "configuration.md", "sample.md"} <= places
    assert {f"llada {name} --help" for name in cli.COMMANDS} - places == {"llada bench --help"}  # which has no examples
    assert {each.words[1] for each in FOUND if each.words[0] == "llada" and len(each.words) > 1} >= cli.COMMANDS.keys()


@pytest.mark.parametrize("each", [each for each in FOUND if each.words[0] == "llada" and not each.named_only], ids=str)
def test_it_is_parsed(each):
    if {"--help", "--version"} & set(each.words):
        with pytest.raises(SystemExit) as ended:
            cli.main(list(each.words[1:]))
        assert ended.value.code == 0
    else:
        parsed(each)


def test_commands_that_are_only_named_exist():
    for each in FOUND:
        if each.named_only:
            program, name, *action = (*each.words, "--help")
            if program == "llada":
                action = action[:-1]
                assert name in cli.COMMANDS or name.startswith("--"), each
                assert name != "bench" or set(action) <= bench.BENCHMARKS.keys(), each
                assert name != "convert" or set(action) <= {"import", "export", "upcycle", "verify", "inspect"}, each
                assert name != "eval" or set(action) <= {"likelihood", "harness", "infill", "report"}, each
            elif program == "python":
                assert importlib.util.find_spec(action[0]), each


@pytest.mark.parametrize("each", of("train", "submit", "inspect"), ids=str)
def test_its_configuration_is_accepted(each):
    args = parsed(each)
    name = args.config
    overrides = [text for text in args.overrides if text != "key.path=value" and "=OUT" not in text]
    if name in MODELS.names():
        load_model(name, overrides)
        return
    load_run(name if name in RUNS.names() else OWN_RUN, overrides)
    if hasattr(args, "cluster"):
        load_cluster(args.cluster if (ROOT / f"configs/clusters/{args.cluster}.yaml").exists() else OWN_CLUSTER)


@pytest.mark.parametrize("each", [each for each in of("inspect", "env") if each.words[-1] != "RUN"], ids=str)
def test_what_takes_no_time_is_run(each, capsys):
    words = [OWN_RUN if word in ("MODEL-OR-RUN", "my_run.yaml") else word for word in each.words[1:]]
    assert cli.main(words) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("each", [each for each in of("submit") if "--dry-run" in each.words], ids=str)
def test_a_dry_run_is_run(each, capsys, tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    own = {"ours": OWN_CLUSTER, "CLUSTER.yaml": OWN_CLUSTER, "RUN.yaml": "llada-8b-pretrain"}
    assert cli.main([own.get(word, word) for word in each.words[1:] if word != "key.path=value"]) == 0
    assert "#SBATCH" in capsys.readouterr().out


@pytest.mark.parametrize(
    "each", [each for each in of("sample", "watch", "chat") if each.words[-1] != "--help"], ids=str
)
def test_its_method_is_accepted(each, capsys, tmp_path, monkeypatch):
    args = parsed(each)
    if getattr(args, "list_presets", False):
        assert cli.main(list(each.words[1:])) == 0
        assert "fast-dllm-dual" in capsys.readouterr().out
        return
    assert args.checkpoint
    monkeypatch.setattr(options, "_check_layout", lambda layout, checkpoint: None)  # there is no model to fit
    args.checkpoint = str(tmp_path)
    settings = options.settings_of(args)
    run = load_run(OWN_RUN)
    if settings.preset is not None and PRESETS[settings.preset].verifies:
        run = replace(run, objective=JointConfig(kind="joint", block_size=32))
    parts = settings.preset, settings.schedule, settings.cache, settings.editor, settings.overrides
    choose(*parts, run.objective, run.model, block_length=settings.block_length)
    if hasattr(args, "edit"):
        options.prompt_options_of(args)


@pytest.mark.parametrize("each", of("prepare", "convert"), ids=str)
def test_its_options_go_together(each):
    args = parsed(each)
    if each.words[1] == "prepare":
        prepare._check_arguments(args)
    parse_layout(getattr(args, "layout", None))
    parse_size(getattr(args, "shard_size", "1GB"))


@pytest.mark.parametrize("each", [each for each in FOUND if each.words[0] == "make" and not each.named_only], ids=str)
def test_make_knows_it(each, monkeypatch):
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    variables = dict(word.split("=", 1) for word in each.words[1:] if "=" in word)
    (target,) = (word for word in each.words[1:] if "=" not in word)
    assert target in targets and variables.keys() <= {"PYTHON", "ARGS"}
    if target == "demo":
        monkeypatch.setattr(demo, "run", lambda args: 0)
        assert demo.main(variables.get("ARGS", "").split()) == 0


@pytest.mark.parametrize("each", [each for each in FOUND if each.words[0] == "python" and not each.named_only], ids=str)
def test_a_benchmark_of_the_repository_takes_its_options(each):
    parser = argparse.ArgumentParser()
    importlib.import_module(each.words[2]).add_arguments(parser)
    bench.add_require(parser)
    parser.parse_args(each.words[3:])


def test_what_pip_is_told_to_install_is_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = [each for each in FOUND if each.words[0] == "pip"]
    assert len(found) > 3
    for each in found:
        for constraint in [each.words[at + 1] for at, word in enumerate(each.words) if word == "-c"]:
            assert Path(ROOT, constraint).is_file(), each
        for names in re.findall(r"\.\[(.*?)\]", " ".join(each.words)):
            assert set(names.split(",")) <= extras.keys(), each
