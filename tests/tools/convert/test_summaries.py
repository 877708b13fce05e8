"""What a conversion says of itself at its end, and when it looks at the tokenizer."""

import json

import torch

from llada_megatron import cli
from llada_megatron.tools.convert import importer
from tests.tools.convert.checkpoints import config_of, tensors_of, to_huggingface, to_sharded, with_tokenizer, write
from tests.tools.convert.checkpoints import written as checkpoint


def test_tensors_that_are_left_out_are_not_counted(tmp_path):
    tensors = dict(tensors_of("tiny-dense"))
    whole = to_sharded(write(tmp_path / "a", tensors, config_of("tiny-dense")), tmp_path / "whole")
    ignored = "model.transformer.blocks.0.rotary_emb.inv_freq"
    source = write(tmp_path / "b", tensors | {ignored: torch.ones(4)}, config_of("tiny-dense"))
    found = to_sharded(source, tmp_path / "found")
    assert any(ignored in note for note in found["notes"])
    assert found["tensors"] == whole["tensors"] == len(tensors)


def test_files_larger_than_they_should_be_are_noted(tmp_path, capsys):
    to_sharded(checkpoint(tmp_path / "source", "tiny-dense"), tmp_path / "run")
    words = [str(tmp_path / "run"), str(tmp_path / "small"), "--shard-size", "1KB", "--without-tokenizer"]
    assert cli.main(["convert", "export", *words]) == 0
    assert "files exceed --shard-size, by up to" in capsys.readouterr().err
    assert not any("--shard-size" in note for note in to_huggingface(tmp_path / "run", tmp_path / "large")["notes"])


def test_the_tokenizer_is_read_at_first(tmp_path, monkeypatch):
    source = with_tokenizer(checkpoint(tmp_path / "source", "tiny-dense"))
    before = (source / "tokenizer.json").read_bytes()
    run_tasks = importer.run_tasks

    def run_and_change(*arguments):
        (source / "tokenizer.json").write_text("{}")
        return run_tasks(*arguments)

    monkeypatch.setattr(importer, "run_tasks", run_and_change)
    to_sharded(source, tmp_path / "run")
    assert (tmp_path / "run/tokenizer/tokenizer.json").read_bytes() == before
    manifest = json.loads((tmp_path / "run" / importer.STEP / "manifest.json").read_text())
    assert manifest["facts"]["tokenizer"]["path"] == str(tmp_path / "run/tokenizer/tokenizer.json")


def test_the_files_of_many_ranks_are_allowed_for(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(importer, "workers_for_files", lambda *numbers: asked.append(numbers) or 1)
    to_sharded(checkpoint(tmp_path / "source", "tiny-moe", files=2), tmp_path / "run", "expert_parallel=4", workers=8)
    assert asked == [(8, 4, 2)]
