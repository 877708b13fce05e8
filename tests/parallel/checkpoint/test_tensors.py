"""Weights read tensor by tensor equal those of one process, whatever layout wrote them; lies are refused."""

import functools
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llada_megatron.llada_moe.config import to_dict
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.checkpoint import safety
from llada_megatron.parallel.checkpoint.conversion.shard_reader import ShardedReader
from llada_megatron.parallel.checkpoint.manifest import DamagedCheckpointError
from tests.parallel.checkpoint.initial_weights import chunks_of, run_of, weights
from tests.ranks import run_ranks

MODELS = ("tiny-dense", "tiny-moe", "tiny-moe-softmax")
CASES = [
    (model, layout)
    for model in MODELS
    for layout in ("TP2", "PP2", "EP2", "ETP2", "TP2.PP2")
    if model != "tiny-dense" or not layout.startswith("E")
]


def _save(run, root):
    """Save the initial weights, which are the same under every layout."""
    from llada_megatron.parallel import sharded_state
    from llada_megatron.parallel.checkpoint.store import CheckpointStore

    state = sharded_state.model_state(chunks_of(run)) | {"optimizer": {"updates": 3}}
    CheckpointStore(root).save(1, state, {"step": 1, "model": to_dict(run.model)})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The step directory that a run of a model under a layout wrote."""
    root = tmp_path_factory.mktemp("saved")

    @functools.cache
    def save(model, layout):
        run = run_of(model, layout)
        run_ranks(_save, run.layout.world_size, run, root / model / layout)
        return root / model / layout / "step-00000001"

    return save


# --- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "layout"), CASES)
def test_the_weights_of_any_layout_are_those_of_one_process(saved, model, layout):
    reader, expected = ShardedReader(saved(model, layout)), weights(model)
    assert reader.tensors == {key: (value.dtype, tuple(value.shape)) for key, value in expected.items()}
    assert not any("layers.*" in key or "decoder.layers.self" in key for key in reader.tensors)
    assert reader.manifest.metadata["step"] == 1
    for key, value in expected.items():
        assert torch.equal(reader.read(key), value), key


@pytest.mark.parametrize("layout", ["one", "TP2", "ETP2"])
def test_a_part_of_a_weight_is_read_alone(saved, layout):
    reader, expected = ShardedReader(saved("tiny-moe", layout)), weights("tiny-moe")
    for key, value in expected.items():
        rows = value.shape[0]
        assert torch.equal(reader.read(key, (), 1, rows - 1), value[1 : rows - 1]), key
        if value.dim() == 3:
            part = reader.read(key, (rows - 1,), 5, 50)
            assert torch.equal(part, value[rows - 1, 5:50]) and part.is_contiguous()
            assert torch.equal(reader.read(key, (2, 3)), value[2, 3])
            assert part.untyped_storage().nbytes() == part.nbytes


def test_threads_share_a_reader(saved):
    reader, expected = ShardedReader(saved("tiny-moe", "TP2.PP2")), weights("tiny-moe")
    with ThreadPoolExecutor(4) as pool:
        found = dict(zip(expected, pool.map(reader.read, expected), strict=True))
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_what_is_not_there_is_not_read(saved):
    reader = ShardedReader(saved("tiny-dense", "TP2"))
    with pytest.raises(CheckpointError, match="has no weight 'absent'"):
        reader.read("absent")
    for index, start, stop in (((), -1, None), ((), 0, 300), ((300,), 0, 1), ((), 5, 5)):
        with pytest.raises(IndexError):
            reader.read("output_layer.weight", index, start, stop)


def test_a_view_with_gaps_is_read_too(tmp_path):
    run_ranks(_save_transposed, 1, tmp_path)
    reader = ShardedReader(tmp_path / "step-00000001")
    assert torch.equal(reader.read("w", (), 1, 3), torch.arange(12.0).view(3, 4).t()[1:3])


def _save_transposed(root):
    """A tensor that is not contiguous in the file: Megatron makes tensors contiguous, other writers need not."""
    from megatron.core.dist_checkpointing import ShardedTensor

    from llada_megatron.parallel.checkpoint.store import CheckpointStore

    CheckpointStore(root).save(1, {"w": ShardedTensor.from_rank_offsets("w", torch.zeros(4, 3))}, {"step": 1})
    directory = root / "step-00000001"
    found = pickle.loads((directory / safety.METADATA).read_bytes())
    place = next(iter(found.storage_data.values()))
    torch.save(torch.arange(12.0).view(3, 4).t(), directory / place.relative_path)
    place.offset, place.length = 0, (directory / place.relative_path).stat().st_size
    (directory / safety.METADATA).write_bytes(pickle.dumps(found))
    _with_new_hashes(directory)


# --- damaged and hostile ------------------------------------------------------------------------------------


def _with_new_hashes(directory):
    """What an attacker does after changing a file."""
    names = [path.name for path in directory.iterdir() if path.name != manifests.FILE_NAME]
    files = {name: manifests.record(directory / name) for name in names}
    manifests.write(directory, manifests.Manifest({"step": 1}, files))
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved("tiny-dense", "one"), tmp_path / "copy")


def test_a_changed_byte_is_found(copy):
    reader = ShardedReader(copy)
    for name in reader.manifest.files:
        reader.verify(name)
    path = copy / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match="__0_0.distcp does not hold the bytes"):
        reader.verify(path.name)


def test_a_truncated_file_is_found_before_anything_is_read(copy):
    with (copy / "__0_0.distcp").open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(DamagedCheckpointError, match="has 1,000 bytes instead of"):
        ShardedReader(copy)
    with pytest.raises(CheckpointError, match="ends before"):
        ShardedReader(_with_new_hashes(copy))


KEY = "decoder.layers.0.mlp.linear_fc2.weight"


def _changed(directory, change):
    """`change(metadata)`, with hashes that fit."""
    found = pickle.loads((directory / safety.METADATA).read_bytes())
    change(found)
    (directory / safety.METADATA).write_bytes(pickle.dumps(found))
    return _with_new_hashes(directory)


def _set(found, **attributes):
    vars(found.state_dict_metadata[KEY]).update(attributes)


def _place(found):
    return next(place for index, place in found.storage_data.items() if index.fqn == KEY)


def _chunk(found):
    return found.state_dict_metadata[KEY].chunks[0]


def _overlap(found):
    value = found.state_dict_metadata[KEY]
    value.chunks = [value.chunks[0], value.chunks[0]]


LIES = {
    "outside": lambda found: setattr(_chunk(found), "offsets", torch.Size([0, 1])),
    "outside negative": lambda found: setattr(_chunk(found), "sizes", torch.Size([64, -128])),
    "2,048 elements together instead of 8,192": lambda found: setattr(_chunk(found), "sizes", torch.Size([16, 128])),
    "overlap": _overlap,
    "axes": lambda found: setattr(_chunk(found), "sizes", torch.Size([64])),
    "no axes": lambda found: _set(found, size=torch.Size([])),
    "no sense": lambda found: _set(found, size=[64, 128]),
    "no sense (text)": lambda found: _set(found, size=("64", "128")),
    "no sense (dtype)": lambda found: setattr(found.state_dict_metadata[KEY].properties, "dtype", "bf16"),
    "no sense (chunks)": lambda found: _set(found, chunks=None),
    "no sense (absent)": lambda found: found.storage_data.pop(
        next(index for index in found.storage_data if index.fqn == KEY)
    ),
    "ends before": lambda found: setattr(_place(found), "length", 1 << 40),
    "not a file of the checkpoint": lambda found: setattr(_place(found), "relative_path", "../secret"),
}


@pytest.mark.parametrize("lie", LIES)
def test_impossible_descriptions_are_refused(copy, lie):
    with pytest.raises(CheckpointError, match=lie.split(" (")[0].removesuffix(" negative")):
        ShardedReader(_changed(copy, LIES[lie]))


class Payload:
    """Unpickling an instance makes a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda marker: Payload(marker), "not a saved tensor.*UnpicklingError"),
        (lambda marker: [1, 2], "holds a list instead of a plain tensor"),
        (lambda marker: torch.zeros(64, 127), r"holds torch.float32 \[64, 127\] instead of torch.float32 \[64, 128\]"),
        (lambda marker: torch.zeros(64, 128).bfloat16(), "holds torch.bfloat16"),
        (lambda marker: torch.nn.Parameter(torch.zeros(64, 128)), "holds a Parameter"),
        (lambda marker: torch.zeros(1).expand(64, 128).to_sparse(), "instead of a plain tensor"),
    ],
    ids=["payload", "object", "shape", "dtype", "parameter", "sparse"],
)
def test_an_entry_that_is_not_the_tensor_is_refused_and_does_not_run(copy, tmp_path, content, message):
    def plant(found):
        place = _place(found)
        path = copy / place.relative_path
        size = path.stat().st_size
        with path.open("ab") as stream:
            torch.save(content(tmp_path / "marker"), stream)
        place.offset, place.length = size, path.stat().st_size - size

    reader = ShardedReader(_changed(copy, plant))
    with pytest.raises(CheckpointError, match=message):
        reader.read(KEY)
    assert not (tmp_path / "marker").exists()


def test_an_entry_cut_short_is_refused(copy):
    reader = ShardedReader(_changed(copy, lambda found: setattr(_place(found), "length", _place(found).length - 300)))
    with pytest.raises(CheckpointError, match="not a saved tensor"):
        reader.read(KEY)
    (copy / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        reader.read(KEY)
