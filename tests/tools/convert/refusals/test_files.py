"""Files that a conversion refuses: missing, cut short, lying, or a danger."""

import json
import re

import pytest

from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.tools.convert.inspector import open_source
from tests.tools.convert.checkpoints import INDEX, files_of, to_huggingface, to_sharded
from tests.tools.convert.refusals.refusal import GATE, refused


def test_a_missing_shard(source):
    (source / "model-00002-of-00003.safetensors").unlink()
    refused(
        source, "model-00002-of-00003.safetensors is missing", "it holds tensor 'model.", "download or copy it again"
    )


def test_a_truncated_file(source):
    path = source / "model-00003-of-00003.safetensors"
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 5)
    refused(source, str(path), "is truncated", "is cut off", "again")


def test_an_index_that_lies(source):
    index = json.loads((source / INDEX).read_text())
    places = index["weight_map"]
    other = places[GATE]
    claimed = next(file for file in sorted(places.values()) if file != other)
    places[GATE] = claimed
    (source / INDEX).write_text(json.dumps(index))
    refused(source, INDEX, repr(GATE), f"is in {claimed}, which does not hold it", f"{other} holds")
    del places[GATE]
    (source / INDEX).write_text(json.dumps(index))
    refused(source, f"{other} holds tensor {GATE!r}", "does not name")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..", "x\0y"])
def test_names_that_point_outside(source, name):
    (source.parent / "secret.safetensors").write_bytes(b"")
    index = json.loads((source / INDEX).read_text())
    index["weight_map"][GATE] = name
    (source / INDEX).write_text(json.dumps(index))
    refused(source, INDEX, repr(GATE), repr(name), "not a file of this directory: refused", "a source you trust")


def test_pickles(source):
    for path in source.glob("*.safetensors*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(source, "holds only pickles (pytorch_model.bin)", "save_pretrained, which writes safetensors")
    index = {"weight_map": {GATE: "pytorch_model.bin"}}
    (source / INDEX).write_text(json.dumps(index))
    refused(source, "'pytorch_model.bin'", "only .safetensors files are read", "save_pretrained")


def test_pickles_alone(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source/pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = refused(tmp_path / "source", "holds only pickles (pytorch_model.bin)", "write it with save_pretrained")
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_source(tmp_path / "source")


def test_pickles_beside_a_sharded_checkpoint(sharded):
    (sharded / "notes.pt").write_bytes(b"\x80\x04.")
    for directory in (sharded, sharded / "checkpoints/step-00000000"):
        assert open_source(directory).kind == "sharded, step 0"
    (sharded / "checkpoints/step-00000000/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        open_source(sharded / "checkpoints/step-00000000")


def test_no_configuration(source):
    (source / "config.json").write_text("{")
    refused(source, "config.json cannot be read")
    (source / "config.json").write_text("[]")
    refused(source, "config.json is not a JSON object")
    (source / "config.json").unlink()
    refused(source, "config.json is missing", "download the whole repository")


def test_python_files_are_neither_run_nor_copied(source, tmp_path):
    marker = tmp_path / "ran"
    for name in ("modeling_lladamoe.py", "configuration_lladamoe.py", "tokenization_x.py", "__init__.py", "setup.py"):
        (source / name).write_text(f"open({str(marker)!r}, 'w')\n")
    to_sharded(source, tmp_path / "out")
    to_huggingface(tmp_path / "out", tmp_path / "exported")
    assert not marker.exists()
    for made in ("out", "exported"):
        assert not [name for name, content in files_of(tmp_path / made).items() if str(marker).encode() in content]
