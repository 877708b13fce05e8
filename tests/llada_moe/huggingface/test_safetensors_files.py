"""Reading and writing .safetensors files, with the `safetensors` library as the oracle in both directions."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llada_megatron.llada_moe.errors import CheckpointError, ResourceError
from llada_megatron.llada_moe.huggingface.safetensors_header import DTYPES
from llada_megatron.llada_moe.huggingface.safetensors_reader import INDEX_NAME, SINGLE_NAME, TensorDirectory
from llada_megatron.llada_moe.huggingface.safetensors_writer import ShardWriter, shard_name, write_index

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
DRAWN = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(list(DTYPES.values())), SHAPES),
    max_size=6,
)


def random_tensor(dtype, shape, seed=0):
    """Random bytes as a tensor (NaNs included); booleans are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    high = 2 if dtype == torch.bool else 256
    size = (math.prod(shape) * dtype.itemsize,)
    return torch.randint(0, high, size, dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def same(a, b):
    """Equal in dtype, shape and every bit."""
    bits = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def write_tensors(path, tensors, rows=None):
    """Write `tensors` in their order, in blocks of `rows` rows."""
    with ShardWriter(path, [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]) as writer:
        for tensor in tensors.values():
            for block in tensor.split(rows) if rows and tensor.numel() and tensor.dim() else [tensor]:
                writer.append(block)


@given(drawn=DRAWN, seed=st.integers(0, 1000))
def test_reads_what_the_library_writes(tmp_path_factory, drawn, seed):
    tensors = {name: random_tensor(*kind, seed) for name, kind in drawn.items()}
    directory = tmp_path_factory.mktemp("library")
    save_file(tensors, directory / SINGLE_NAME)
    with TensorDirectory(directory) as found:
        assert found.tensors.keys() == tensors.keys()
        assert found.bytes == sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        assert all(same(found.read(name), tensor) for name, tensor in tensors.items())


@given(drawn=DRAWN, seed=st.integers(0, 1000), rows=st.integers(1, 3))
def test_the_library_reads_what_we_write(tmp_path_factory, drawn, seed, rows):
    tensors = {name: random_tensor(*kind, seed) for name, kind in drawn.items()}
    path = tmp_path_factory.mktemp("ours") / SINGLE_NAME
    write_tensors(path, tensors, rows)
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[name], tensor) for name, tensor in tensors.items())
    with TensorDirectory(path.parent) as found:
        assert list(found.tensors) == list(tensors)
        assert all(same(found.read(name), tensor) for name, tensor in tensors.items())


@given(shape=st.tuples(st.integers(0, 6), st.integers(0, 3)), data=st.data())
def test_rows_are_slices_in_their_own_memory(tmp_path_factory, shape, data):
    tensor = random_tensor(torch.bfloat16, shape)
    start = data.draw(st.integers(0, shape[0]))
    stop = data.draw(st.integers(start, shape[0]))
    directory = tmp_path_factory.mktemp("rows")
    write_tensors(directory / "weights.safetensors", {"before": torch.ones(3), "w": tensor})
    with TensorDirectory(directory) as found:
        rows = found.read("w", start, stop)
        assert same(rows, tensor[start:stop]) and rows.is_contiguous()
        rows.view(torch.uint8).zero_()
        assert same(found.read("w"), tensor)


def test_bytes_equal_the_librarys_in_its_order(tmp_path):
    tensors = {
        "a": torch.arange(3),
        "b": torch.ones(2, 3),
        "é": torch.ones(5),
        "c": torch.ones(7).bfloat16(),
    }
    save_file(tensors, tmp_path / "library.safetensors", {"format": "pt"})
    write_tensors(tmp_path / "ours.safetensors", tensors)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "library.safetensors").read_bytes()


def test_data_is_aligned_in_the_announced_order_with_the_format_named(tmp_path):
    tensors = {f"t{number}": torch.ones(number) for number in (3, 1, 2)}
    write_tensors(tmp_path / SINGLE_NAME, tensors)
    with safe_open(tmp_path / SINGLE_NAME, "pt") as stream:
        assert stream.metadata() == {"format": "pt"}
    infos = list(TensorDirectory(tmp_path).tensors.values())
    assert [info.name for info in infos] == list(tensors)
    assert infos[0].offset % 8 == 0
    assert [(info.rows, info.size) for info in infos] == [(3, 12), (1, 4), (2, 8)]
    assert {info.file for info in infos} == {tmp_path / SINGLE_NAME}


def test_shards_through_links_and_many_threads(tmp_path):
    blobs, directory = tmp_path / "another disk", tmp_path / "snapshot"
    blobs.mkdir()
    directory.mkdir()
    tensors = {f"w{number}": random_tensor(torch.float32, (50, 40), number) for number in range(12)}
    weight_map = {name: shard_name(1 + number % 3, 3) for number, name in enumerate(tensors)}
    for number in (1, 2, 3):
        name = shard_name(number, 3)
        write_tensors(blobs / str(number), {key: tensors[key] for key, file in weight_map.items() if file == name})
        (directory / name).symlink_to(blobs / str(number))
    write_index(directory, weight_map, 12 * 50 * 40 * 4)
    assert json.loads((directory / INDEX_NAME).read_text())["metadata"] == {"total_size": 96_000}
    with TensorDirectory(directory) as found, ThreadPoolExecutor(8) as pool:
        assert [path.name for path in found.files] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
        assert found.bytes == 96_000
        names = [name for name in tensors for _ in range(20)]
        assert all(same(tensors[name], read) for name, read in zip(names, pool.map(found.read, names), strict=True))


def test_no_more_descriptors_after_close_and_reads_open_again(tmp_path):
    write_tensors(tmp_path / SINGLE_NAME, {"w": torch.ones(2)})
    found = TensorDirectory(tmp_path)
    for _ in range(3):
        assert found.read("w").tolist() == [1, 1]
        found.close()
        assert not found._descriptors


def test_rows_outside_a_tensor_and_unknown_names(tmp_path):
    write_tensors(tmp_path / SINGLE_NAME, {"w": torch.ones(4, 2), "s": torch.tensor(1.0)})
    with TensorDirectory(tmp_path) as found:
        for name, start, stop in (("w", 3, 5), ("w", -1, 2), ("w", 3, 2), ("s", 0, 2), ("s", 0, 0)):
            with pytest.raises(IndexError, match=f"'{name}'"):
                found.read(name, start, stop)
        with pytest.raises(CheckpointError, match="holds no tensor 'v'"):
            found.read("v")


def test_any_memory_layout_can_be_written(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / SINGLE_NAME, {"w": tensor.T, "step": tensor[:, ::2], "grad": tensor.requires_grad_()})
    with TensorDirectory(tmp_path) as found:
        assert same(found.read("w"), tensor.T.detach()) and same(found.read("step"), tensor[:, ::2].detach())


@pytest.mark.parametrize(
    "block",
    [torch.ones(2, 3, dtype=torch.float16), torch.ones(2, 4), torch.ones(4, 3), torch.ones(3), torch.tensor(1.0)],
)
def test_blocks_that_do_not_continue_the_tensor(tmp_path, block):
    writer = ShardWriter(tmp_path / "x.safetensors", [("w", torch.float32, (4, 3))])
    writer.append(torch.ones(1, 3))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: tensor 'w' was announced as torch.float32 \[4, 3\]"):
        writer.append(block)


def test_an_unfinished_shard_does_not_close_and_is_not_read(tmp_path):
    writer = ShardWriter(tmp_path / SINGLE_NAME, [("w", torch.float32, (4, 3)), ("v", torch.float32, (2,))])
    writer.append(torch.ones(1, 3))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not complete: 1 rows of tensor 'w' .*and 1"):
        writer.close()
    with pytest.raises(CheckpointError, match="truncated"):
        TensorDirectory(tmp_path)


def test_an_error_inside_the_writer_is_not_hidden_and_leaves_no_file(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path / SINGLE_NAME, [("w", torch.float32, (4,))]):
        raise KeyError
    with pytest.raises(CheckpointError), ShardWriter(tmp_path / SINGLE_NAME, [("w", torch.float32, (4,))]):
        pass
    assert not list(tmp_path.iterdir())


def test_announcements_that_cannot_be_written(tmp_path):
    w = ("w", torch.float32, (1,))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: tensor 'w' was announced twice"):
        ShardWriter(tmp_path / "x.safetensors", [w, w])
    with pytest.raises(CheckpointError, match=r"tensor 'w' has torch.complex64, which is not written: F64"):
        ShardWriter(tmp_path / "x.safetensors", [("w", torch.complex64, (1,))])
    with pytest.raises(CheckpointError, match="cannot be written"):
        ShardWriter(tmp_path / "absent" / "x.safetensors", [w])
    with ShardWriter(tmp_path / "x.safetensors", [w]) as writer:
        writer.append(torch.ones(1))
        with pytest.raises(CheckpointError, match="all 1 announced tensors are written"):
            writer.append(torch.ones(1))


def test_a_full_disk_says_what_to_do(tmp_path):
    (tmp_path / "x.safetensors").symlink_to("/dev/full")
    with pytest.raises(ResourceError, match=r"no space left to write .*x\.safetensors .*free some"):
        ShardWriter(tmp_path / "x.safetensors", [("w", torch.float32, (1,))])
