"""Model and optimizer through a checkpoint: the same run goes on bit for bit, and under another layout within 1e-5."""

import dataclasses
import functools

import pytest
import torch
from torch import distributed as dist

from llada_megatron.launch.resources import checkpoint_bytes
from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.tools.bench.layouts import DENSE, SIGMOID, parity_run
from tests.ranks import run_ranks

LAYOUTS = {
    "one": LayoutConfig(),
    "TP2.SP": LayoutConfig(tensor_parallel=2, sequence_parallel=True),
    "PP2": LayoutConfig(pipeline_parallel=2),
    "PP2 uneven": LayoutConfig(pipeline_parallel=2, pipeline_layers=[3, 1]),
    "PP2 interleaved": LayoutConfig(pipeline_parallel=2, pipeline_chunks_per_rank=2),
    "CP2": LayoutConfig(context_parallel=2),
    "DP2": LayoutConfig(data_parallel=2),
    "EP2": LayoutConfig(data_parallel=2, expert_parallel=2),
}
FIRST, LAST = 2, 4


def _run(model, layout, **training):
    return parity_run(model, LAYOUTS[layout], global_batch_size=4, **training)


def _parts(run):
    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.training import distributed_optimizer
    from llada_megatron.parallel.training.step import TrainingStep
    from llada_megatron.tools.bench.parity import SyntheticData

    topology.initialize(run.layout, run.training.seed)
    chunks = build.build_run_chunks(run)
    models = build.wrap(run, chunks)
    return chunks, TrainingStep(run, models, distributed_optimizer.build_optimizer(run, models), SyntheticData(run))


def _sharded(chunks, step, loading):
    from llada_megatron.parallel import sharded_state
    from llada_megatron.parallel.training import distributed_optimizer

    state = sharded_state.model_state(chunks)
    return {**state, "optimizer": distributed_optimizer.optimizer_state(step.optimizer, state, loading)}


def _train(run, step, numbers):
    from llada_megatron.parallel.training.distributed_optimizer import set_learning_rate

    outcome = []
    for number in numbers:
        set_learning_rate(run, step.optimizer, number)
        result = step(number)
        loss = result.losses.loss.clone()
        dist.all_reduce(loss)
        outcome.append((float(loss) / run.layout.tensor_parallel, result.grad_norm))
    return outcome


def _begin(run, root, asynchronous):
    """Two steps, a checkpoint, two more steps: their losses and gradient norms."""
    from llada_megatron.llada_moe.config import to_dict
    from llada_megatron.parallel.checkpoint.store import CheckpointStore

    chunks, step = _parts(run)
    store = CheckpointStore(root, asynchronous=asynchronous)
    _train(run, step, range(FIRST))
    metadata = {"model": to_dict(run.model), "step": FIRST}
    store.save(FIRST, _sharded(chunks, step, False), metadata, {"distrib_optim_sharding_type": "fully_reshardable"})
    outcome = _train(run, step, range(FIRST, LAST))
    store.finish()
    return outcome


def _save_one_step(run, root):
    from llada_megatron.parallel.checkpoint.store import CheckpointStore

    chunks, step = _parts(run)
    _train(run, step, [0])
    CheckpointStore(root).save(1, _sharded(chunks, step, False), {"step": 1})


def _go_on(run, root):
    """The same two steps from the checkpoint."""
    from llada_megatron.llada_moe.config import to_dict
    from llada_megatron.parallel import sharded_state
    from llada_megatron.parallel.checkpoint.store import CheckpointStore
    from llada_megatron.parallel.training.distributed_optimizer import load_optimizer_state

    chunks, step = _parts(dataclasses.replace(run, training=dataclasses.replace(run.training, seed=99)))
    step.run = run
    step.data.__init__(run)
    store = CheckpointStore(root)
    state, metadata = store.load(store.latest(), _sharded(chunks, step, True), to_dict(run.model))
    sharded_state.load_model_state(chunks, state)
    load_optimizer_state(step.optimizer, sharded_state.model_state(chunks), state["optimizer"])
    return _train(run, step, range(metadata["step"], LAST))


@functools.cache
def _begun(directory, model, layout, asynchronous=False):
    run = _run(model, layout)
    root = directory / f"{layout} {model.family} {asynchronous}"
    return root, run_ranks(_begin, run.layout.world_size, run, root, asynchronous)[0]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("layouts")


@pytest.mark.parametrize(
    ("model", "wrote", "reads"),
    [
        (DENSE, "TP2.SP", "PP2"),
        (DENSE, "DP2", "PP2 interleaved"),
        (SIGMOID, "EP2", "one"),
        (SIGMOID, "one", "EP2"),
        (SIGMOID, "one", "CP2"),
        (SIGMOID, "EP2", "TP2.SP"),
        (SIGMOID, "EP2", "PP2 uneven"),
        (DENSE, "PP2 uneven", "PP2"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.family,
)
def test_another_layout_goes_on_with_the_same_run(directory, model, wrote, reads):
    root, expected = _begun(directory, model, wrote)
    run = _run(model, reads)
    for outcome in run_ranks(_go_on, run.layout.world_size, run, root):
        for (loss, norm), (expected_loss, expected_norm) in zip(outcome, expected, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)


@pytest.mark.parametrize(
    ("model", "layout", "asynchronous"),
    [(DENSE, "TP2.SP", True), (SIGMOID, "EP2", False)],
    ids=["dense, asynchronous", "experts"],
)
def test_the_same_layout_goes_on_bit_for_bit(directory, model, layout, asynchronous):
    root, expected = _begun(directory, model, layout, asynchronous)
    run = _run(model, layout)
    assert run_ranks(_go_on, run.layout.world_size, run, root)[0] == expected


def test_bf16_keeps_its_full_precision_weights(tmp_path):
    run = _run(DENSE, "DP2", precision="bf16")
    expected = run_ranks(_begin, 2, run, tmp_path, False)[0]
    assert run_ranks(_go_on, 2, run, tmp_path)[0] == expected
    assert all(torch.isfinite(torch.tensor(expected)).flatten())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_size_of_a_checkpoint_is_known_before_one_is_written(tmp_path, precision):
    run = _run(load_model("small-moe"), "DP2", precision=precision)
    run_ranks(_save_one_step, 2, run, tmp_path)
    written = sum(path.stat().st_size for path in (tmp_path / "step-00000001").iterdir())
    assert 1.0 < written / checkpoint_bytes(run) < 1.03
