"""What an interrupted conversion goes on with, and what it refuses."""

import os
import shutil

import pytest
import torch

from llada_megatron.llada_moe.errors import CheckpointError, ConfigError
from llada_megatron.tools.convert import exporter, importer, workspace
from tests.tools.convert.checkpoints import (
    WORDS,
    differing,
    files_of,
    read,
    to_huggingface,
    to_sharded,
    with_tokenizer,
    written,
)


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """The source of an import that was interrupted."""
    source = with_tokenizer(written(tmp_path / "source", "tiny-moe", "fp32", files=2))
    with monkeypatch.context() as patch:
        patch.setattr(importer, "finalize", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            to_sharded(source, tmp_path / "out", "tensor_parallel=2")
    return source


def _interrupt(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ("--layout, tensor_parallel: 2 -> 4", {"layout": "tensor_parallel=4"}),
        ("--dtype: None -> torch.bfloat16", {"dtype": torch.bfloat16}),
        ("--mask-token-id: none -> 9", {"mask_token_id": 9}),
    ],
)
def test_other_options_do_not_go_on(begun, change, options):
    options = {"layout": "tensor_parallel=2"} | options
    with pytest.raises(ConfigError, match=f"unfinished .* differs in {change}. Repeat that command to finish it"):
        to_sharded(begun, begun.with_name("out"), **options)
    to_sharded(begun, begun.with_name("out"), "tensor_parallel=2", workers=3)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("model-00001-of-00002.safetensors", r"source's files, model-00001-of-00002.safetensors: (.*) bytes of .* ->"),
        ("config.json", "source's configuration: .* ->"),
        ("tokenizer.json", "source's tokenizer, tokenizer.json: .* ->"),
    ],
)
def test_other_files_do_not_go_on(begun, file, change):
    with (begun / file).open("r+b") as stream:
        last = stream.seek(-1, os.SEEK_END)
        byte = stream.read(1)
        stream.seek(last)
        stream.write(byte + b"\n" if file.endswith("json") else b"\x01")
    with pytest.raises(ConfigError, match=f"{change}.*or remove that directory to start anew"):
        to_sharded(begun, begun.with_name("out"), "tensor_parallel=2")
    shutil.rmtree(begun.with_name(".out.converting"))
    to_sharded(begun, begun.with_name("out"), "tensor_parallel=2")


def test_another_source_or_direction_does_not_go_on(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "copy")
    with pytest.raises(ConfigError, match="differs in source: .*source -> .*copy"):
        to_sharded(tmp_path / "copy", tmp_path / "out", "tensor_parallel=2")
    to_sharded(begun, tmp_path / "other")
    with pytest.raises(ConfigError, match="differs in direction: import -> export"):
        to_huggingface(tmp_path / "other", tmp_path / "out")


def test_other_options_of_an_export_do_not_go_on(tmp_path, monkeypatch):
    to_sharded(written(tmp_path / "source", "tiny-dense"), tmp_path / "sharded")
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "model_card", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            to_huggingface(tmp_path / "sharded", tmp_path / "out", shard_bytes=10**5)
    with pytest.raises(ConfigError, match="--shard-size: 100000 -> 1000000"):
        to_huggingface(tmp_path / "sharded", tmp_path / "out", shard_bytes=10**6)
    to_huggingface(tmp_path / "sharded", tmp_path / "out", shard_bytes=10**5)
    to_huggingface(tmp_path / "sharded", tmp_path / "undisturbed", shard_bytes=10**5)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "undisturbed")


def test_an_export_does_not_go_on_with_another_tokenizer(tmp_path, monkeypatch):
    to_sharded(written(tmp_path / "source", "tiny-dense"), tmp_path / "sharded")
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        with_tokenizer(tmp_path / name, f"{WORDS} {name}")
    with monkeypatch.context() as patch:
        patch.setattr(exporter, "model_card", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            to_huggingface(tmp_path / "sharded", tmp_path / "out", tokenizer=tmp_path / "first")
    with pytest.raises(ConfigError, match=r"differs in tokenizer, tokenizer.json: \w+ -> \w+"):
        to_huggingface(tmp_path / "sharded", tmp_path / "out", tokenizer=tmp_path / "second")
    to_huggingface(tmp_path / "sharded", tmp_path / "out", tokenizer=tmp_path / "first")
    assert (tmp_path / "out/tokenizer.json").exists()


def test_an_export_goes_on_with_the_step_it_began_with(tmp_path, monkeypatch, capsys):
    source = written(tmp_path / "source", "tiny-dense")
    to_sharded(source, tmp_path / "run")
    newer = tmp_path / "run/checkpoints/step-00000007"
    for published in (False, True):
        with monkeypatch.context() as patch:
            if published:
                patch.setattr(workspace.Workspace, "_clean", lambda self: self.target.exists() and _interrupt())
            else:
                patch.setattr(exporter, "model_card", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                to_huggingface(tmp_path / "run", tmp_path / "out")
        shutil.copytree(newer.with_name("step-00000000"), newer)
        assert to_huggingface(tmp_path / "run", tmp_path / "out")["tensors"]
        assert "goes on with step-00000000, although" in capsys.readouterr().err
        assert not (tmp_path / ".out.converting").exists()
        with pytest.raises(ConfigError, match="not empty"):
            to_huggingface(tmp_path / "run", tmp_path / "out")
        assert differing(read(tmp_path / "out"), read(source)) == []
        shutil.rmtree(tmp_path / "out")
        shutil.rmtree(newer)
    shutil.copytree(newer.with_name("step-00000000"), newer)
    to_huggingface(tmp_path / "run", tmp_path / "out")
    assert capsys.readouterr().err == ""


def test_a_target_that_was_filled_meanwhile(begun, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("")
    with pytest.raises(ConfigError, match=r"out is not empty \(it holds 'mine'\)"):
        to_sharded(begun, tmp_path / "out", "tensor_parallel=2")
    assert (tmp_path / "out/mine").exists()


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_finished_part_whose_file_is_gone_or_cut_is_done_again(begun, tmp_path, damage, capsys):
    path = sorted((tmp_path / ".out.converting/output").rglob("*.distcp"))[-1]
    if damage == "gone":
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size - 1)
    to_sharded(begun, tmp_path / "out", "tensor_parallel=2")
    assert "files of 1 finished parts are gone or cut: these are done again" in capsys.readouterr().err
    to_sharded(begun, tmp_path / "undisturbed", "tensor_parallel=2")
    weights = tmp_path / "out" / importer.STEP
    found = {path.name: path.read_bytes() for path in weights.iterdir() if path.name != "manifest.json"}
    assert found == {name: (tmp_path / "undisturbed" / importer.STEP / name).read_bytes() for name in found}


@pytest.mark.parametrize("module", [importer, exporter])
@pytest.mark.parametrize("change", ["written", "removed"])
def test_a_source_that_changes_meanwhile(tmp_path, monkeypatch, module, change):
    source = written(tmp_path / "source", "tiny-dense")
    convert, file = to_sharded, source / "model.safetensors"
    if module is exporter:
        to_sharded(source, tmp_path / "run")
        source, convert = tmp_path / "run", to_huggingface
        file = source / importer.STEP / "__0_0.distcp"
    run_tasks = module.run_tasks

    def run_and_change(*arguments):
        records = run_tasks(*arguments)
        if change == "written":
            os.utime(file, (1, 1))
        else:
            file.unlink()
        return records

    monkeypatch.setattr(module, "run_tasks", run_and_change)
    text = {"written": rf"changed while it was converted \({file.name}: .*remove", "removed": f"{file} went away"}[
        change
    ]
    with pytest.raises(CheckpointError, match=text):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
