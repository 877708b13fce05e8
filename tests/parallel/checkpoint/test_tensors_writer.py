"""What tasks write shard by shard is a checkpoint like any other."""

import json

import pytest
import torch

from llada_megatron.llada_moe.config import load_model, to_dict
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.checkpoint import safety
from llada_megatron.parallel.checkpoint.conversion.placement import rank_shards
from llada_megatron.parallel.checkpoint.conversion.shard_reader import ShardedReader
from llada_megatron.parallel.checkpoint.conversion.shard_writer import TaskWriter, finalize
from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint
from tests.parallel.checkpoint.initial_weights import LAYOUTS, run_of, weights
from tests.ranks import run_ranks

TASKS = 3
FACTS = {"step": 0, "imported": True}


def _write(directory, model, layout, order=range(TASKS), dtype=None):
    """Convert the weights of `model` in tasks; their records, as they come back from a JSON file."""
    directory.mkdir(parents=True, exist_ok=True)
    config, records = load_model(model), []
    for number in order:
        task = TaskWriter(directory, number)
        for key, value in list(weights(model).items())[number::TASKS]:
            value = value if dtype is None or key.endswith("expert_bias") else value.to(dtype)
            for index in [(expert,) for expert in range(value.shape[0])] if value.dim() == 3 else [()]:
                whole = value[index]
                for shard in rank_shards(config, LAYOUTS[layout], key, index, 0, whole.shape[0]):
                    task.append(shard.rank, key, tuple(value.shape), shard.offsets, whole[shard.slices])
        records.append(json.loads(json.dumps(task.close())))
    return records


def _metadata(model, layout):
    run = run_of(model, layout)
    return FACTS | {"model": to_dict(run.model), "run": to_dict(run)}


def _load(run, path):
    """Save again what `load_checkpoint` gives."""
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.checkpoint.loaded_model import load_checkpoint
    from llada_megatron.parallel.checkpoint.store import CheckpointStore
    from llada_megatron.parallel.sharded_state import model_state

    topology.initialize(run.layout, 7)
    loaded = load_checkpoint(path, run.layout)
    assert {p.dtype for name, p in loaded.model.named_parameters()} == {torch.float32}
    CheckpointStore(path.parent / "again").save(1, model_state([loaded.model]), loaded.metadata)


@pytest.mark.parametrize(
    ("model", "wrote", "reads", "dtype"),
    [
        ("tiny-dense", "TP2", "TP2", torch.bfloat16),
        ("tiny-dense", "one", "TP2.PP2", torch.float32),
        ("tiny-dense", "PP2", "TP2", torch.float32),
        ("tiny-moe", "one", "ETP2", torch.bfloat16),
        ("tiny-moe", "EP2", "one", torch.float32),
        ("tiny-moe", "TP2.PP2", "TP2.PP2", torch.float32),
        ("tiny-moe-softmax", "ETP2", "EP2", torch.float32),
        ("tiny-moe-softmax", "TP2", "PP2", torch.float32),
    ],
)
def test_what_was_written_loads_under_every_layout_bit_for_bit(tmp_path, model, wrote, reads, dtype):
    directory = tmp_path / "step-00000000"
    finalize(directory, _write(directory, model, wrote, dtype=dtype), _metadata(model, wrote))
    expected = {key: value if key.endswith("expert_bias") else value.to(dtype) for key, value in weights(model).items()}
    reader = ShardedReader(directory)
    for name in reader.manifest.files:
        reader.verify(name)
    safety.refuse_unsafe(directory, manifests.read(directory).files)
    assert all(torch.equal(reader.read(key), value) for key, value in expected.items())
    run = run_of(model, reads)
    run_ranks(_load, run.layout.world_size, run, directory)
    again = ShardedReader(tmp_path / "again" / "step-00000001")
    assert set(again.tensors) == set(expected)
    assert all(torch.equal(again.read(key), value.float()) for key, value in expected.items())


def test_what_was_written_opens_in_one_process(tmp_path):
    directory = tmp_path / "step-00000000"
    finalize(directory, _write(directory, "tiny-moe", "EP2"), _metadata("tiny-moe", "EP2"))
    with open_checkpoint(tmp_path) as loaded:
        found = dict(loaded.model.named_parameters())
    key = "output_layer.weight"
    assert loaded.metadata["imported"] and torch.equal(found[key], weights("tiny-moe")[key])


def test_the_same_pieces_give_the_same_bytes(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    finalize(one, _write(one, "tiny-moe", "TP2.PP2"), FACTS)
    _write(other, "tiny-moe", "TP2.PP2", [1])  # done again below, as after a kill
    (other / "__0_2.distcp").write_bytes(b"half")
    finalize(other, _write(other, "tiny-moe", "TP2.PP2", [2, 0, 1]), FACTS)
    files = {path.name: path.read_bytes() for path in one.iterdir()}
    assert {path.name: path.read_bytes() for path in other.iterdir()} == files
    assert {name.split("_")[2] for name in files if name.endswith(".distcp")} == set("0123")


def test_a_view_is_written_without_what_surrounds_it(tmp_path):
    whole = torch.randn(1000, 100)
    task = TaskWriter(tmp_path, 0)
    task.append(0, "w", (4, 10), (0, 0), whole[5:9, :10])
    task.append(0, "v", (1, 2, 100), (0, 0, 0), whole[1:3])
    record = task.close()
    finalize(tmp_path, [record], FACTS)
    assert record["files"]["__0_0.distcp"]["size"] < 5000
    reader = ShardedReader(tmp_path)
    assert torch.equal(reader.read("w"), whole[5:9, :10]) and torch.equal(reader.read("v", (0,), 1), whole[2:3])


def test_a_discarded_task_leaves_nothing(tmp_path):
    task = TaskWriter(tmp_path, 0)
    task.append(3, "w", (4,), (0,), torch.zeros(4))
    task.discard()
    assert list(tmp_path.iterdir()) == []
    task = TaskWriter(tmp_path, 0)
    task.append(3, "w", (4,), (0,), torch.zeros(4))
    task.close()
    task.discard()
    assert [path.name for path in tmp_path.iterdir()] == ["__3_0.distcp"]


def _spoil_gap(directory, records):
    records[0]["entries"].pop()


def _spoil_twice(directory, records):
    records.append(records[0])


def _spoil_dtype(directory, records):
    records[-1]["entries"][-1]["dtype"] = "bfloat16"


def _spoil_size(directory, records):
    with (directory / next(iter(records[0]["files"]))).open("ab") as stream:
        stream.write(b"x")


def _spoil_missing(directory, records):
    (directory / next(iter(records[0]["files"]))).unlink()


def _spoil_extra(directory, records):
    (directory / "__9_9.distcp").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_spoil_gap, "elements together instead of"),
        (_spoil_twice, "two tasks wrote __0_0.distcp"),
        (_spoil_dtype, "parts of different dtypes"),
        (_spoil_size, "bytes instead of"),
        (_spoil_missing, "is missing"),
        (_spoil_extra, "__9_9.distcp is not in"),
    ],
)
def test_an_incomplete_conversion_is_no_checkpoint(tmp_path, spoil, message):
    records = _write(tmp_path, "tiny-dense", "TP2")
    spoil(tmp_path, records)
    with pytest.raises(CheckpointError, match=message):
        finalize(tmp_path, records, FACTS)
    assert not (tmp_path / manifests.FILE_NAME).exists()
