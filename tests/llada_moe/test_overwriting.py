"""No output is an input, by whatever name, and none lies in a checkpoint."""

import os

import pytest

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.overwriting import refuse_inside_checkpoint, refuse_overwriting


@pytest.fixture
def read(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("precious")
    return path


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_a_file_that_is_read_is_not_written_under_any_name(read, tmp_path, link):
    output = read
    if link is not None:
        output = tmp_path / "other.jsonl"
        link(read, output)
    with pytest.raises(
        ConfigError, match=r"--output: .*jsonl is (a file that|the same file as .*, which) this command"
    ):
        refuse_overwriting("--output", [tmp_path / "new", output], [None, read])


def test_another_way_to_the_folder_is_the_same_file(read, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    with pytest.raises(ConfigError, match="is the same file as"):
        refuse_overwriting("--output", ["../in.jsonl"], [read])
    with pytest.raises(ConfigError, match="is the same file as"):
        refuse_overwriting("--output", ["../in.jsonl"], [tmp_path])
    refuse_overwriting("--output", ["../new.jsonl"], [tmp_path])


def test_what_is_not_read_may_be_written(read, tmp_path):
    refuse_overwriting("--output", [tmp_path / "new", tmp_path / "in.jsonl.part-0"], [read, tmp_path / "nowhere", None])


def test_a_checkpoint_stays_as_it_was_saved(tmp_path):
    step = tmp_path / "checkpoints/step-00000001"
    step.mkdir(parents=True)
    refuse_inside_checkpoint("--output", step / "out.jsonl")
    for name in ("manifest.json", "metadata.json"):
        (step / name).write_text("{}")
    for inside in (step / "out.jsonl", step / "deep/er"):
        with pytest.raises(ConfigError, match=f"lies in the checkpoint {step}"):
            refuse_overwriting("--output", [inside], [])
    refuse_inside_checkpoint("--output", step.parent / "out.jsonl")
