"""Directories and files that are refused: each message names the file and the tensor, and says what to do."""

import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.huggingface.safetensors_reader import INDEX_NAME, SINGLE_NAME, TensorDirectory
from llada_megatron.llada_moe.huggingface.safetensors_writer import shard_name, write_index

FIRST, SECOND = shard_name(1, 2), shard_name(2, 2)


@pytest.fixture
def sharded(tmp_path):
    """Tensors a, b in the first shard and c in the second, with their index."""
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, tmp_path / FIRST)
    save_file({"c": torch.ones(5)}, tmp_path / SECOND)
    write_index(tmp_path, {"a": FIRST, "b": FIRST, "c": SECOND}, 60)
    return tmp_path


def refused(directory, *parts):
    """Opening `directory` is refused with a message that has all `parts`."""
    with pytest.raises(CheckpointError) as caught:
        TensorDirectory(directory)
    for part in parts:
        assert str(part) in str(caught.value)


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_missing_shard(sharded):
    (sharded / FIRST).unlink()
    refused(sharded, sharded / FIRST, "is missing: download or copy it again", "it holds tensor 'a' and 1 more")


def test_link_to_nothing(sharded):
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to("../blobs/absent")
    refused(sharded, sharded / SECOND, "is a link to ../blobs/absent, where no file is", "tensor 'c'")


def test_a_pipe_in_place_of_a_file_does_not_block(sharded):
    (sharded / SECOND).unlink()
    os.mkfifo(sharded / SECOND)
    refused(sharded, sharded / SECOND, "is not a regular file", "tensor 'c'")


def test_truncated_data(sharded):
    path = sharded / FIRST
    size = path.stat().st_size
    os.truncate(path, size - 1)
    refused(sharded, f"{path} is truncated", f"{size} bytes, {size - 1} are there", "is cut off", "copy it again")


@pytest.mark.parametrize("size", [0, 7])
def test_file_too_short_for_a_length(sharded, size):
    os.truncate(sharded / FIRST, size)
    refused(sharded, sharded / FIRST, f"has {size} bytes, too few", "copy it again")


def test_truncated_header(sharded):
    os.truncate(sharded / FIRST, 20)
    refused(sharded, f"{sharded / FIRST} is truncated: it states a header of", "12 are there", "copy it again")


def test_truncated_while_in_use(sharded):
    with TensorDirectory(sharded) as found:
        os.truncate(sharded / SECOND, found.tensors["c"].offset + 8)
        with pytest.raises(CheckpointError, match=f"{SECOND} was truncated while in use.*tensor 'c' .*copy it again"):
            found.read("c")


def test_taken_away_while_in_use(sharded):
    with TensorDirectory(sharded) as found:
        (sharded / SECOND).unlink()
        with pytest.raises(CheckpointError, match=f"{SECOND} cannot be opened.*tensor 'c'"):
            found.read("c")


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"a": 1, "a": 2}', b""])
def test_header_that_is_not_json(tmp_path, text):
    write_raw(tmp_path / SINGLE_NAME, text)
    refused(tmp_path, f"{tmp_path / SINGLE_NAME}: the header is not valid JSON", "copy it again")


def test_header_that_is_not_an_object(tmp_path):
    write_raw(tmp_path / SINGLE_NAME, [])
    refused(tmp_path, f"{tmp_path / SINGLE_NAME}: the header is not a JSON object")


def test_header_too_large(tmp_path):
    (tmp_path / SINGLE_NAME).write_bytes((100_000_001).to_bytes(8, "little") + b"{}")
    refused(tmp_path, tmp_path / SINGLE_NAME, "a header of 100,000,001 bytes", "not a safetensors file, or damaged")


def test_git_lfs_pointer(tmp_path):
    (tmp_path / SINGLE_NAME).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(tmp_path, tmp_path / SINGLE_NAME, "Git LFS pointer", "git lfs pull")


@pytest.mark.parametrize(
    ("header", "size", "parts"),
    [
        ({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, 12, ["'b' overlaps", "the one before ends at"]),
        ({"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, 8, ["overlaps"]),
        ({"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, 20, ["'b' leaves a gap"]),
        ({"a": entry(4, 12, [2])}, 12, ["'a' leaves a gap"]),
        ({"a": entry(0, 8, [2])}, 9, ["1 more than its tensors take"]),
        ({}, 3, ["3 more than its tensors take"]),
        ({"a": entry(0, 8, [3])}, 8, ["'a' of dtype F32 and shape [3] takes 12 bytes", "state 8"]),
        ({"a": entry(8, 0, [2])}, 8, ["'a'", "state -8"]),
        ({"a": entry(-8, 0, [2])}, 8, ["'a'", "not whole numbers"]),
        ({"a": entry(0, 8, [2.0])}, 8, ["'a'", "not whole numbers"]),
        ({"a": entry(0, 8, [True, 2])}, 8, ["'a'", "not whole numbers"]),
        ({"a": entry(0, 0, [2**62, 2**62, 0])}, 0, ["'a'", "larger than any memory"]),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, ["'a' lacks"]),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, 8, ["'a' lacks"]),
        ({"a": "F32"}, 8, ["'a' lacks"]),
        ({"__metadata__": {"format": 1}}, 0, ["__metadata__", "table of strings"]),
    ],
)
def test_header_that_contradicts_itself(tmp_path, header, size, parts):
    write_raw(tmp_path / SINGLE_NAME, header, bytes(size))
    refused(tmp_path, tmp_path / SINGLE_NAME, "download or copy it again", *parts)


@pytest.mark.parametrize("dtype", ["F4", "F8_E8M0", "C64", "U64", "float32"])
def test_unknown_dtype(tmp_path, dtype):
    write_raw(tmp_path / SINGLE_NAME, {"a": entry(0, 8, [1], dtype)}, bytes(8))
    refused(tmp_path, f"{tmp_path / SINGLE_NAME}: tensor 'a' has dtype '{dtype}'", "known: F64, F32", "save it as BF16")


@given(position=st.integers(0, 200), byte=st.integers(0, 255))
def test_a_damaged_byte_is_harmless_or_refused(tmp_path_factory, position, byte):
    path = tmp_path_factory.mktemp("damaged") / SINGLE_NAME
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path, {"format": "pt"})
    content = bytearray(path.read_bytes())
    content[position % len(content)] = byte
    path.write_bytes(content)
    try:
        with TensorDirectory(path.parent) as found:
            assert sum(found.read(name).nbytes for name in found.tensors) == found.bytes
    except CheckpointError as error:
        assert str(path) in str(error)


def test_the_same_tensor_in_two_files(sharded):
    save_file({"a": torch.zeros(2, 3), "c": torch.ones(5)}, sharded / SECOND)
    refused(sharded, "tensor 'a' is in", sharded / FIRST, sharded / SECOND, "which counts is not said", "copy it again")


def test_index_names_a_tensor_the_file_lacks(sharded):
    write_index(sharded, {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}, 60)
    refused(sharded, sharded / INDEX_NAME, f"tensor 'd' is in {SECOND}, which does not hold it", "copy it again")


def test_index_names_the_wrong_file(sharded):
    write_index(sharded, {"a": FIRST, "b": SECOND, "c": SECOND}, 60)
    refused(sharded, f"tensor 'b' is in {SECOND}, which does not hold it; {FIRST} holds it", "of other files")


def test_file_holds_a_tensor_the_index_does_not_name(sharded):
    write_index(sharded, {"a": FIRST, "c": SECOND}, 60)
    refused(sharded, f"{sharded / FIRST} holds tensor 'b', which {INDEX_NAME} does not name", "copy it again")


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "x\0.safetensors"],
)
def test_index_that_points_outside(sharded, name):
    points_outside(sharded, name)


@pytest.mark.parametrize("name", ["..", ".", "", "\x1b[2J.safetensors", "\ud800.safetensors", 7, None])
def test_index_with_names_of_no_file(sharded, name):
    points_outside(sharded, name)


def points_outside(sharded, name):
    (sharded / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": name}}))
    refused(sharded, sharded / INDEX_NAME, "tensor 'a' is in", repr(name), "a source you trust")


def test_index_of_pickles(sharded):
    (sharded / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    refused(sharded, "tensor 'a' is in 'pytorch_model.bin'", "only .safetensors files are read", "save_pretrained")


@pytest.mark.parametrize("text", ["", "{", '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'])
def test_index_that_is_not_json(sharded, text):
    (sharded / INDEX_NAME).write_text(text)
    refused(sharded, f"{sharded / INDEX_NAME}: the index is not valid JSON", "copy it again")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_index_without_a_table(sharded, text):
    (sharded / INDEX_NAME).write_text(text)
    refused(sharded, f"{sharded / INDEX_NAME} has no weight_map", "copy it again")


def test_two_sets_of_weights(sharded):
    save_file({"a": torch.ones(1)}, sharded / SINGLE_NAME)
    refused(sharded, f"holds {SINGLE_NAME} and {INDEX_NAME}", "remove")


def test_shards_without_an_index(sharded):
    (sharded / INDEX_NAME).unlink()
    refused(sharded, f"{sharded} holds 2 .safetensors files", FIRST, SECOND, "copy the index too")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_only_pickles(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, f"{tmp_path} holds only pickles ({name})", "on a machine you trust", "save_pretrained")


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, f"{tmp_path} holds no weights", INDEX_NAME, "download or copy it again")


def test_no_directory(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE_NAME)
    refused(tmp_path / SINGLE_NAME, tmp_path / SINGLE_NAME, "is not a directory: give the one that holds")
    refused(tmp_path / "absent", "is not a directory")
