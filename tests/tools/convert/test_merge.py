"""`llada merge`: the mean of checkpoints of any layout, chosen by the validation loss that their manifests keep."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llada_megatron.cli import main
from llada_megatron.llada_moe.config import load_model, to_dict
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.model.patterns import AttentionPattern
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.checkpoint.conversion.shard_reader import ShardedReader
from llada_megatron.parallel.checkpoint.manifest import Manifest
from llada_megatron.tools.convert import importer
from llada_megatron.tools.convert.best_checkpoints import Candidate, best
from tests.tools.convert.checkpoints import bits, config_of, tensors_of, to_sharded, with_tokenizer, write

LAYOUTS = (None, "tensor_parallel=2", "pipeline_parallel=2")


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def run_of_checkpoints(root, name, losses, model="tiny-dense", dtype="fp32", layouts=LAYOUTS, first=0, **run):
    """A run's folder with a checkpoint every ten steps, of these validation losses and of other weights each."""
    steps = root / name / "checkpoints"
    for number, loss in enumerate(losses):
        source = root / f"{name}-{number}-source"
        with_tokenizer(write(source, tensors_of(model, dtype, seed=first + number), config_of(model)))
        to_sharded(source, root / f"{name}-{number}", layouts[number % len(layouts)])
        step = steps / manifests.step_name(10 * (number + 1))
        step.parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}-{number}" / importer.STEP).rename(step)
        if number == 0:
            (root / f"{name}-{number}" / "tokenizer").rename(root / name / "tokenizer")
        validation = {} if loss is None else {"validation": {"nats_per_token": loss, "pattern": "p"}}
        change_facts(step, step=10 * (number + 1), **validation, **run)
    return root / name


def change_facts(directory, **facts):
    known = manifests.read(directory)
    manifests.write(directory, Manifest(known.metadata | facts, known.files))


def merge(*arguments):
    return main(["merge", *map(str, arguments)])


def last_json(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Four checkpoints, the best of which are those of steps 40 and 20."""
    return run_of_checkpoints(tmp_path_factory.mktemp("merge"), "run", [3.0, 1.5, 2.0, 1.0])


def test_the_best_are_averaged_whatever_layouts_wrote_them(trained, tmp_path, capsys):
    layout = "tensor_parallel=2,pipeline_parallel=2"
    assert merge(trained, "--best", 2, "--output", tmp_path / "out", "--layout", layout, "--json") == 0
    found = last_json(capsys)
    assert [(each["step"], each["validation_loss"]) for each in found["merged"]] == [(40, 1.0), (20, 1.5)]
    merged = ShardedReader(tmp_path / "out/checkpoints/step-00000040")
    assert merged.directory == (tmp_path / "out/checkpoints/step-00000040").absolute()
    parts = [ShardedReader(trained / f"checkpoints/step-000000{step}") for step in (40, 20)]
    assert merged.tensors == parts[0].tensors
    for key in merged.tensors:
        mean = ((parts[0].read(key).double() + parts[1].read(key).double()) / 2).float()
        assert bits(merged.read(key)) == bits(mean), key
    assert {name.split("_")[2] for name in merged.manifest.files if name.endswith(".distcp")} == set("0123")
    facts = merged.manifest.metadata
    assert [each["step"] for each in facts["merged"]] == [40, 20] and "validation" not in facts
    assert facts["tokenizer"]["path"] == str(tmp_path / "out/tokenizer/tokenizer.json")
    assert (tmp_path / "out/tokenizer/tokenizer.json").read_bytes() == (
        trained / "tokenizer/tokenizer.json"
    ).read_bytes()
    assert to_dict(load_model(tmp_path / "out/model.yaml")) == facts["model"] == parts[0].manifest.metadata["model"]


def test_inspect_names_what_was_averaged(trained, tmp_path, capsys):
    assert merge(trained, "--best", 2, "--output", tmp_path / "out") == 0
    assert main(["convert", "inspect", str(tmp_path / "out"), "--json"]) == 0
    history = last_json(capsys)["history"]
    assert history["average of"].split(", ") == [str(trained / f"checkpoints/step-000000{step}") for step in (40, 20)]


def test_the_mean_of_equal_weights_is_these_weights(tmp_path):
    layouts = {"a": None, "b": "tensor_parallel=2", "c": "expert_parallel=2,pipeline_parallel=2"}
    runs = [run_of_checkpoints(tmp_path, name, [1.0], "tiny-moe", "bf16", (cut,)) for name, cut in layouts.items()]
    assert merge(*runs, "--output", tmp_path / "out") == 0
    merged, one = (ShardedReader(folder / "checkpoints/step-00000010") for folder in (tmp_path / "out", runs[0]))
    assert merged.tensors == one.tensors
    assert [key for key in one.tensors if bits(merged.read(key)) != bits(one.read(key))] == []


def test_named_steps_are_averaged_without_validation_losses(tmp_path, capsys):
    run = run_of_checkpoints(tmp_path, "run", [None, None, None])
    steps = [run / "checkpoints" / manifests.step_name(step) for step in (10, 30)]
    assert merge(*steps, "--output", tmp_path / "out", "--json") == 0
    assert [each["step"] for each in last_json(capsys)["merged"]] == [30, 10]


def test_a_damaged_checkpoint_of_a_run_is_passed_over(tmp_path, capsys):
    run = run_of_checkpoints(tmp_path, "run", [1.0, 2.0, 3.0])
    next((run / "checkpoints/step-00000010").glob("*.distcp")).write_bytes(b"cut")
    assert merge(run, "--best", 2, "--output", tmp_path / "out", "--json") == 0
    captured = capsys.readouterr()
    assert "passed over a damaged checkpoint" in captured.err
    assert [each["step"] for each in json.loads(captured.out.splitlines()[-1])["merged"]] == [30, 20]
    assert merge(run / "checkpoints/step-00000010", run / "checkpoints/step-00000020", "--output", tmp_path / "no") == 1


def refusal(capsys, *arguments):
    """The one line that says why nothing was merged."""
    code = merge(*arguments)
    captured = capsys.readouterr()
    assert code in (1, 2) and captured.out == "" and len(captured.err.strip().splitlines()) == 1, captured
    return captured.err


def test_bytes_that_changed_are_found(trained, tmp_path, capsys):
    run = run_of_checkpoints(tmp_path, "run", [1.0, 2.0])
    file = max((run / "checkpoints/step-00000010").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert merge(run, "--output", tmp_path / "out") == 1
    assert "does not hold the bytes that were written" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("losses", "count", "words"),
    [
        ([None, None], 2, "none of 2 checkpoints has a validation loss"),
        ([1.0, None, float("nan")], 2, "1 of 3 checkpoints have a validation loss"),
        ([1.0, 2.0], 1, "--best 1: an average takes at least 2"),
    ],
)
def test_without_enough_validation_losses_nothing_is_merged(tmp_path, capsys, losses, count, words):
    run = run_of_checkpoints(tmp_path, "run", losses, layouts=(None,))
    assert words in refusal(capsys, run, "--best", count, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_losses_that_were_measured_differently_are_not_compared(trained, tmp_path, capsys):
    other = run_of_checkpoints(tmp_path, "other", [1.0], layouts=(None,))
    step = other / "checkpoints/step-00000010"
    facts = manifests.read(step).metadata
    facts["run"]["training"]["seed"] = 4711
    change_facts(step, run=facts["run"])
    text = refusal(capsys, trained, other, "--best", 2, "--output", tmp_path / "out")
    assert "training.seed" in text and "4711" in text
    assert merge(trained / "checkpoints/step-00000010", step, "--output", tmp_path / "out") == 0


def test_other_models_tokenizers_and_dtypes_are_refused(trained, tmp_path, capsys):
    wider = replace(load_model("tiny-dense"), ffn_hidden_size=96)
    first = trained / "checkpoints/step-00000010"
    for name, model, dtype, words in (
        ("moe", "tiny-moe", "fp32", "have different architectures"),
        ("wide", wider, "fp32", "ffn_hidden_size: 96 and 128"),
        ("rounded", "tiny-dense", "bf16", "give --dtype bf16 or fp32"),
    ):
        other = run_of_checkpoints(tmp_path, name, [1.0, 1.0], model, dtype, (None,)) / "checkpoints/step-00000020"
        assert words in refusal(capsys, first, other, "--output", tmp_path / "out")
    change_facts(other, tokenizer={"sha256": "0" * 64, "vocab_size": 15, "path": "elsewhere"})
    assert "have different tokenizers" in refusal(capsys, first, other, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_checkpoint_or_one_named_twice_is_no_average(trained, tmp_path, capsys):
    step = trained / "checkpoints/step-00000010"
    assert "is the only checkpoint there" in refusal(capsys, step, "--output", tmp_path / "out")
    assert "is named twice" in refusal(capsys, trained, step, "--output", tmp_path / "out")


def test_mixed_dtypes_are_averaged_with_dtype(trained, tmp_path):
    other = run_of_checkpoints(tmp_path, "other", [1.0], dtype="bf16", layouts=(None,), first=9)
    steps = trained / "checkpoints/step-00000010", other / "checkpoints/step-00000010"
    assert merge(*steps, "--output", tmp_path / "out", "--dtype", "fp32") == 0
    merged, a, b = map(ShardedReader, (tmp_path / "out/checkpoints/step-00000010", *steps))
    key = "decoder.layers.0.mlp.linear_fc1.weight"
    torch.testing.assert_close(merged.read(key), (a.read(key) + b.read(key).float()) / 2, rtol=1e-6, atol=1e-7)


def staged(step, loss, stage, blocks):
    """A checkpoint of a run over block sizes."""
    run = {"objective": {"kind": "block_diffusion", "block_schedule": {"stable": {"block_size": 64, "tokens": 1}}}}
    validation = {"nats_per_token": loss, "pattern": f"blocks of {blocks}"}
    facts = {"run": run, "validation": validation, "objective": {"stage": stage, "block_size": blocks}}
    return Candidate(Path(f"step-{step}"), step, facts)


def test_the_attention_of_a_checkpoint_from_before_a_field_is_the_same():
    def measured(step, pattern):
        return Candidate(Path(f"step-{step}"), step, {"validation": {"nats_per_token": 1.0, "pattern": pattern}})

    now = str(AttentionPattern(32, doubled=True))
    older = measured(1, "AttentionPattern(block=32, doubled=True)")
    assert len(best([older, measured(2, now)], 2)) == 2
    causal = measured(3, str(AttentionPattern(32, doubled=True, causal_clean=True)))
    with pytest.raises(CheckpointError, match="measured differently"):
        best([older, causal], 2)


def test_of_a_run_over_block_sizes_the_last_stage_is_ranked(capsys):
    """A stage on the way up has the attention of the last one, and is another."""
    up, wide = staged(10, 0.5, 0, 32), staged(20, 1.0, 1, 64)
    last = [staged(30, 2.0, 2, 32), staged(40, 1.5, 2, 32), staged(50, 1.8, 2, 32)]
    assert best([up, wide, *last], 2) == [last[1], last[2]]
    assert "3 of 5 measured checkpoints are of the last stage of objective.block_schedule (blocks of 32); only" in (
        capsys.readouterr().err
    )
    assert best(last, 3) == [last[1], last[2], last[0]] and capsys.readouterr().err == ""
    with pytest.raises(
        CheckpointError, match=r"--best 4: 3 of 5 measured checkpoints are of the last stage .* Keep more"
    ):
        best([up, wide, *last], 4)
