"""`llada eval reversal` at toy size: models trained and asked, what is on the disk, and what is said of wrong input."""

from __future__ import annotations

import dataclasses
import errno
import json
import os

import pytest

from llada_megatron.launch.evaluation import reversal_command
from llada_megatron.launch.evaluation.reversal_training import ReversalRecipe, prepare_facts
from llada_megatron.llada_moe.data.set_manifest import read_manifest
from llada_megatron.llada_moe.errors import ConfigError, ResourceError
from llada_megatron.llada_moe.evaluation.reversal_facts import make_facts
from llada_megatron.llada_moe.evaluation.reversal_figures import ARMS
from tests.launch.sampling.checkpoints import run_cli

TOY = ReversalRecipe(pairs=12, steps=2, layers=1, hidden=32, heads=2, sequences=16)


def files(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.glob("seed-*/*.json")}


def test_models_are_trained_asked_and_found_again(tmp_path, capsys, monkeypatch):
    output, whole = tmp_path / "out", reversal_command.arm_of_seed

    def interrupted(recipe, arm, *rest):
        if arm == ARMS[2]:
            raise KeyboardInterrupt
        return whole(recipe, arm, *rest)

    monkeypatch.setattr(reversal_command, "arm_of_seed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reversal_command.measure(TOY, 1, output)
    before = files(output)
    assert {"seed-0/autoregressive.json", "seed-0/diffusion.json"} <= set(before), "each result when it is known"
    monkeypatch.setattr(reversal_command, "arm_of_seed", whole)
    assert reversal_command.measure(TOY, 1, output, as_json=True, require=True) == 1, "two steps teach nothing"
    after = files(output)
    assert {name: after[name] for name in before} == before and "seed-0/whole-word-diffusion.json" in after

    out = capsys.readouterr().out
    found = json.loads(out.splitlines()[-1])
    assert found["protocol"]["pairs"] == 12 and found["seeds"] == 1
    assert {claim["claim"] for claim in found["claims"]} >= {"autoregressive: reordered", "diffusion: reordered"}
    assert "0 of 1" in out and "<svg" in (output / "reversal.svg").read_text()

    names = {fact.name for fact in make_facts(0, 12).facts}
    for arm in ARMS:
        answers = json.loads((output / "seed-0" / f"{arm.replace(' ', '-')}.json").read_text())
        assert len(answers) == 8 * 5
        assert {(each["ask"], each["about"]) for each in answers} == {
            ("forward", "name"),
            ("forward", "description"),
            ("in place", "name"),
            ("reordered", "name"),
            ("reordered", "description"),
        }
        assert all((each["margin"] is None) == (each["about"] == "description") for each in answers)
    ranked = json.loads((output / "seed-0" / "autoregressive.json").read_text())
    assert {each["written"] for each in ranked if each["ask"] == "in place"} <= names, "one of all names"

    monkeypatch.setattr(reversal_command, "ReversalRecipe", lambda: TOY)
    code, again, err = run_cli(capsys, "eval", "reversal", "--seeds", 1, "--output", output)
    assert (code, again.strip()) == (0, out.split("{")[0].strip()), err
    (output / "seed-0" / "diffusion.json").write_text("[]")
    code, _, err = run_cli(capsys, "eval", "reversal", "--seeds", 1, "--output", output)
    assert code == 1 and "diffusion.json: not the answers of a model" in err and "remove it" in err


def test_two_processes_find_what_one_does(tmp_path, monkeypatch):
    for folder, processes in (("one", 1), ("two", 2)):
        assert reversal_command.measure(TOY, 1, tmp_path / folder, processes) == 0
    one, two = (sorted((tmp_path / folder).glob("seed-0/*.json")) for folder in ("one", "two"))
    assert len(one) == 3 and [path.read_text() for path in one] == [path.read_text() for path in two]

    (tmp_path / "two" / "seed-0" / "diffusion.json").unlink()
    (tmp_path / "two" / "seed-0" / "autoregressive.json").unlink()
    monkeypatch.setattr(reversal_command, "_start_worker", _dies)
    with pytest.raises(ResourceError, match=r"died .* with fewer --processes"):
        reversal_command.measure(TOY, 1, tmp_path / "two", 2)


def _dies(*_):
    os._exit(1)


def test_the_set_holds_a_fact_a_window(tmp_path):
    facts = make_facts(0, 12)
    prepare_facts(facts, tmp_path / "facts", 11)
    manifest = read_manifest(tmp_path / "facts")
    texts = list(facts.training_texts())
    assert (manifest.documents, manifest.tokens) == (len(texts), 11 * len(texts))


def test_wrong_input(tmp_path, capsys, monkeypatch):
    code, _, err = run_cli(capsys, "eval", "reversal", "--seeds", 0)
    assert (code, "--seeds 0: at least 1" in err) == (2, True)
    code, _, err = run_cli(capsys, "eval", "reversal", "--processes", 0)
    assert (code, "--processes 0: at least 1" in err) == (2, True)
    (tmp_path / "mine.txt").write_text("mine")
    code, _, err = run_cli(capsys, "eval", "reversal", "--output", tmp_path)
    assert (code, "not empty, and without the protocol.json of this benchmark" in err) == (2, True)
    code, _, err = run_cli(capsys, "eval", "reversal", "--output", tmp_path / "mine.txt")
    assert (code, "a file; name a folder" in err) == (2, True)

    other = tmp_path / "other"
    other.mkdir()
    protocol = {"benchmark": "reversal", "version": 1, **dataclasses.asdict(dataclasses.replace(TOY, steps=3))}
    (other / "protocol.json").write_text(json.dumps(protocol))
    with pytest.raises(ConfigError, match=r"measured by another protocol \(steps 3 \(here 2\)\); name another folder"):
        reversal_command.measure(TOY, 1, other)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reversal_command, "arm_of_seed", full)
    with pytest.raises(ResourceError, match="the disk is full; free space and give the same command, which goes on"):
        reversal_command.measure(TOY, 1, tmp_path / "full")
