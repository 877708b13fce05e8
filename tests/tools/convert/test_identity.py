"""Import and export undo each other bit for bit, for every family, from and to any layout; imports run on ranks."""

import functools
import itertools
import json
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from llada_megatron.llada_moe.config import to_dict
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.huggingface import weights as canonical
from llada_megatron.parallel.checkpoint.conversion.shard_reader import ShardedReader
from llada_megatron.parallel.checkpoint.search import run_of
from llada_megatron.tools.convert import importer, parse_layout
from tests.parallel.checkpoint import initial_weights
from tests.ranks import run_ranks
from tests.tools.convert.checkpoints import (
    DTYPES,
    MODELS,
    bits,
    config_of,
    differing,
    read,
    tensors_of,
    to_huggingface,
    to_sharded,
    with_tokenizer,
    written,
)

STEP = "checkpoints/step-00000000"


@pytest.fixture(scope="module", autouse=True)
def no_waiting_for_the_disk():
    """What is durable is another file's matter; this one writes thousands of files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def small_parts(monkeypatch):
    """Embeddings in several blocks of rows, and several tasks."""
    monkeypatch.setattr(canonical, "BLOCK_ELEMENTS", 64 * 50)
    monkeypatch.setattr(importer, "TASK_BYTES", 40_000)


@functools.cache
def layouts(experts):
    """Every layout that fits the tiny models, as `--layout` takes it."""
    axes = {
        "tensor_parallel": (1, 2, 4),
        "pipeline_parallel": (1, 2, 4),
        "pipeline_chunks_per_rank": (1, 2),
        "expert_parallel": (1, 2, 4) if experts else (1,),
        "expert_tensor_parallel": (1, 2) if experts else (1,),
    }
    found = []
    for sizes in itertools.product(*axes.values()):
        stages, chunks = sizes[1:3]
        if chunks == 1 or (stages > 1 and 4 % (stages * chunks) == 0):
            found.append(",".join(f"{axis}={size}" for axis, size in zip(axes, sizes, strict=True)))
    return found


# --- Hugging Face -> sharded -> Hugging Face ------------------------------------------------------------------


@settings(max_examples=20)
@given(
    model=st.sampled_from(MODELS),
    dtype=st.sampled_from(sorted(DTYPES)),
    files=st.sampled_from([1, 3]),
    shard_bytes=st.sampled_from([20_000, 150_000, 10**9]),
    workers=st.integers(1, 3),
    data=st.data(),
)
def test_import_then_export_changes_nothing(tmp_path_factory, model, dtype, files, shard_bytes, workers, data):
    layout = data.draw(st.sampled_from(layouts(model != "tiny-dense")))
    root = tmp_path_factory.mktemp("identity")
    source = written(root / "source", model, dtype, files)
    to_sharded(source, root / "sharded", layout, workers=workers)
    to_huggingface(root / "sharded", root / "exported", shard_bytes=shard_bytes, workers=workers)
    assert differing(read(root / "exported"), tensors_of(model, dtype)) == []
    assert len(list((root / "exported").glob("*.safetensors"))) == 1 or shard_bytes < 10**9
    config = json.loads((root / "exported/config.json").read_text())
    assert {key: config[key] for key in config_of(model)} == config_of(model)
    assert config["torch_dtype"] == str(DTYPES[dtype]).removeprefix("torch.")


@pytest.mark.parametrize("model", MODELS)
def test_blocks_of_rows_and_many_tasks_change_nothing(tmp_path, small_parts, model):
    source = written(tmp_path / "source", model, "fp32")
    to_sharded(source, tmp_path / "sharded", "tensor_parallel=2,pipeline_parallel=2", workers=2)
    files = {path.name for path in (tmp_path / "sharded" / STEP).glob("*.distcp")}
    assert {name.split("_")[2] for name in files} == set("0123")
    assert len({name.split("_")[3] for name in files}) > 3
    to_huggingface(tmp_path / "sharded", tmp_path / "exported", shard_bytes=50_000, workers=2)
    assert differing(read(tmp_path / "exported"), tensors_of(model, "fp32")) == []


def test_shards_are_as_small_as_asked_and_named_by_their_number(tmp_path):
    to_sharded(written(tmp_path / "source", "tiny-moe"), tmp_path / "sharded")
    summary = to_huggingface(tmp_path / "sharded", tmp_path / "exported", shard_bytes=30_000)
    shards = sorted((tmp_path / "exported").glob("*.safetensors"))
    count = len(shards)
    assert [path.name for path in shards] == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    for path in shards:
        held = load_file(path)
        assert sum(value.nbytes for value in held.values()) <= 30_000 or len(held) <= 2, path  # gate and up together
    assert summary["tensors"] == len(tensors_of("tiny-moe")) and count > 10


@pytest.mark.parametrize(("stored", "wanted"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_dtype_converts_all_but_the_expert_bias(tmp_path, stored, wanted):
    source = written(tmp_path / "source", "tiny-moe", stored)
    expected = {
        name: value if name.endswith("expert_bias") else value.to(DTYPES[wanted])
        for name, value in tensors_of("tiny-moe", stored).items()
    }
    to_sharded(source, tmp_path / "converted", dtype=DTYPES[wanted])
    to_huggingface(tmp_path / "converted", tmp_path / "on-import")
    assert differing(read(tmp_path / "on-import"), expected) == []
    assert run_of(tmp_path / "converted" / STEP).training.precision == wanted
    to_sharded(source, tmp_path / "kept")
    to_huggingface(tmp_path / "kept", tmp_path / "on-export", dtype=DTYPES[wanted])
    assert differing(read(tmp_path / "on-export"), expected) == []


def test_tokenizer_files_go_along_unchanged(tmp_path):
    source = with_tokenizer(written(tmp_path / "source", "tiny-dense"))
    (source / "special_tokens_map.json").write_text('{"eos_token": "<|endoftext|>"}')
    (source / "notes.txt").write_text("not of the tokenizer")
    assert to_sharded(source, tmp_path / "sharded")["notes"] == []
    names = ["special_tokens_map.json", "tokenizer.json"]
    assert sorted(path.name for path in (tmp_path / "sharded/tokenizer").iterdir()) == names
    metadata = ShardedReader(tmp_path / "sharded" / STEP).manifest.metadata["tokenizer"]
    assert metadata["path"] == str(tmp_path / "sharded/tokenizer/tokenizer.json") and metadata["vocab_size"] == 15
    assert not [
        note for note in to_huggingface(tmp_path / "sharded", tmp_path / "exported")["notes"] if "not there" in note
    ]
    for folder, name in [("sharded/tokenizer", name) for name in names] + [("exported", "tokenizer.json")]:
        assert (tmp_path / folder / name).read_bytes() == (source / name).read_bytes()


# --- a run's checkpoint -> Hugging Face -> sharded ------------------------------------------------------------


def _train(run, root):
    """Save a run, optimizer included, after one step."""
    from llada_megatron.llada_moe.objectives import make_objective
    from llada_megatron.parallel import build
    from llada_megatron.parallel.checkpoint.store import CheckpointStore
    from llada_megatron.parallel.training import distributed_optimizer
    from llada_megatron.parallel.training.state import RunState
    from llada_megatron.parallel.training.step import TrainingStep
    from llada_megatron.tools.bench.parity import SyntheticData

    chunks = initial_weights.chunks_of(run)
    models = build.wrap(run, chunks)
    built = distributed_optimizer.build_optimizer(run, models)
    distributed_optimizer.set_learning_rate(run, built, 1)
    TrainingStep(run, models, built, SyntheticData(run))(1)
    data = SimpleNamespace(sha256=None, tokenizer=SimpleNamespace(sha256="0" * 64, vocab_size=256, suffix=".json"))
    state = RunState(run, make_objective(run.objective), chunks, built, [data], step=1)
    state.save(CheckpointStore(root / "checkpoints"))


@pytest.mark.parametrize(
    ("model", "wrote", "layout"),
    [
        ("tiny-dense", "TP2.PP2", "pipeline_parallel=4"),
        ("tiny-moe-softmax", "EP2", "tensor_parallel=2,pipeline_parallel=2"),
        ("tiny-moe", "TP2", "expert_parallel=4"),
        ("tiny-moe", "ETP2", "pipeline_parallel=2,pipeline_chunks_per_rank=2,expert_parallel=2"),
        ("tiny-moe", "TP2.PP2", None),
    ],
)
def test_export_then_import_gives_the_weights_of_the_run(tmp_path, small_parts, model, wrote, layout):
    run = initial_weights.run_of(model, wrote)
    run_ranks(_train, run.layout.world_size, run, tmp_path / "run")
    trained = ShardedReader(tmp_path / "run/checkpoints/step-00000001")
    assert not torch.equal(trained.read(canonical.FINAL_NORM), initial_weights.weights(model)[canonical.FINAL_NORM])
    to_huggingface(tmp_path / "run", tmp_path / "exported", shard_bytes=100_000, workers=2)
    to_sharded(tmp_path / "exported", tmp_path / "imported", layout, workers=2)
    imported = ShardedReader(tmp_path / "imported" / STEP)
    assert imported.tensors == trained.tensors
    assert [key for key in trained.tensors if bits(imported.read(key)) != bits(trained.read(key))] == []
    read_back, wanted = to_dict(run_of(tmp_path / "imported" / STEP).model), to_dict(run.model)
    for values in (read_back, wanted):  # how a model is initialised and balanced is not in its format
        values.pop("init_std")
        for key in ("aux_loss_coefficient", "z_loss_coefficient", "expert_bias_update_rate"):
            (values["moe"] or {}).pop(key, None)
    assert read_back == wanted


# --- imported checkpoints run ---------------------------------------------------------------------------------

TOKENS = torch.randint(4, 256, (2, 32), generator=torch.Generator().manual_seed(5))


def _logits(layout, path):
    """What `load_checkpoint` computes under a layout."""
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.checkpoint.loaded_model import load_checkpoint

    topology.initialize(layout, 7)
    loaded = load_checkpoint(path, layout)
    boundaries = torch.arange(0, TOKENS.numel() + 1, TOKENS.shape[1], dtype=torch.int32)
    return loaded.logits(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool), boundaries)


@functools.cache
def _alone(model, root):
    """The logits of one process, and the checkpoint as published."""
    source = written(root / model / "source", model, "fp32")
    to_sharded(source, root / model / "one")
    return source, run_ranks(_logits, 1, parse_layout(None), root / model / "one")[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("logits")


@pytest.mark.parametrize(
    ("model", "imported", "runs"),
    [
        ("tiny-dense", "tensor_parallel=2", "tensor_parallel=2"),
        ("tiny-dense", None, "tensor_parallel=2,pipeline_parallel=2"),
        ("tiny-moe-softmax", "pipeline_parallel=2", "expert_parallel=2"),
        ("tiny-moe", "expert_parallel=2", "expert_parallel=2"),
        ("tiny-moe", "expert_parallel=4,expert_tensor_parallel=2", "pipeline_parallel=2"),
        ("tiny-moe", "tensor_parallel=2,pipeline_parallel=2", "tensor_parallel=2,pipeline_parallel=2"),
    ],
)
def test_an_import_runs_on_ranks_with_the_logits_of_one_process(tmp_path, root, model, imported, runs):
    source, expected = _alone(model, root)
    to_sharded(source, tmp_path / "imported", imported)
    layout = parse_layout(runs)
    for found in run_ranks(_logits, layout.world_size, layout, tmp_path / "imported"):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- layouts on the command line ------------------------------------------------------------------------------


def test_a_layout_has_the_ranks_that_its_experts_need():
    assert parse_layout("tensor_parallel=4,expert_parallel=6").world_size == 12  # not 8, which 6 does not divide
    assert parse_layout("tensor_parallel=2, expert_parallel=8").data_parallel == 4
    assert parse_layout("tensor_parallel=2").sequence_parallel and parse_layout(None).world_size == 1
    with pytest.raises(ConfigError, match="--layout tensor_parallel=2,tensor_parallel=4: tensor_parallel twice"):
        parse_layout("tensor_parallel=2,tensor_parallel=4")
