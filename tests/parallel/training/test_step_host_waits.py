"""Where the host waits for the device in a step of the training loop: once of our own choice, for the verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from llada_megatron.llada_moe.config.intervals import LoggingConfig
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.tools.bench.layouts import DENSE, SIGMOID, parity_run
from tests.host_waits import HostWaits, Wait
from tests.ranks import run_ranks

MICROBATCHES, MOE_LAYERS = 4, 3

Times = Callable[[int], int]
"""How often, from the number of passes through MoE layers that exchange tokens (those of recomputation counted)."""


def once(_passes: int) -> int:
    return 1


OURS = {
    # loss, norm and whether to stop, of all ranks, in one tensor: what decides on the update must be known before it
    Wait("llada_megatron/parallel/training/recovery/attempt.py", "StepRunner._agreed", "tolist"): once
}
MEGATRONS = {
    # 0.16 only: `if num_tokens > 0`; 0.19 clamps on the device
    Wait("megatron/core/distributed/finalize_model_grads.py", "finalize_model_grads", "__bool__"): once,
    # the exchange must know how many tokens go to each rank and expert
    Wait(
        "megatron/core/transformer/moe/token_dispatcher.py",
        "MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
        "Event.synchronize",
    ): lambda passes: passes,
    # 0.16 without Transformer Engine's permutation, before the exchange: of the tokens, and of their weights
    Wait("megatron/core/transformer/moe/moe_utils.py", "permute", "masked_select"): lambda passes: 2 * passes,
}
"""What is left, and why. With Transformer Engine nothing but the dispatcher's is left in a layer."""
BLOCKS = {"objective": "block_diffusion", "block_size": 5, "precision": "bf16"}
ALONE = {
    "dense": (DENSE, {}),
    "experts on one rank, block diffusion in bf16": (SIGMOID, BLOCKS),
}


def trainer_of(run):
    """The training loop on samples from memory, at its first step."""
    from llada_megatron.llada_moe.objectives import make_objective
    from llada_megatron.parallel import build
    from llada_megatron.parallel.training import distributed_optimizer
    from llada_megatron.parallel.training.heartbeat import Heartbeat
    from llada_megatron.parallel.training.recovery.repair import Recovery
    from llada_megatron.parallel.training.reporter import Reporter
    from llada_megatron.parallel.training.state import RunState
    from llada_megatron.parallel.training.step import TrainingStep
    from llada_megatron.parallel.training.trainer import Trainer
    from llada_megatron.tools.bench.parity import SyntheticData

    trainer = object.__new__(Trainer)
    trainer.run, trainer.heartbeat, trainer.stopping = run, Heartbeat.of_rank(0), False
    trainer.objective, trainer.data = make_objective(run.objective, run.training), SyntheticData(run)
    trainer.data.bytes_per_token = 4.0
    chunks = build.build_run_chunks(run)
    trainer.models = build.wrap(run, chunks)
    optimizer = distributed_optimizer.build_optimizer(run, trainer.models)
    trainer.state = RunState(run, trainer.objective, chunks, optimizer, [])
    trainer.step = TrainingStep(run, trainer.models, optimizer, trainer.data, trainer.objective, ahead=True)
    trainer.reporter = Reporter(run, trainer.objective, trainer.models, trainer.data, 0)
    trainer.recovery = Recovery(run, trainer.models, trainer.step, trainer.state, trainer.reporter)
    trainer.saver, trainer.held_out = SimpleNamespace(poll=lambda: None), None  # no save, no validation is due
    trainer.reporter.start(trainer.step.batches(0))
    return trainer


def waits_of_a_step(run):
    """What a rank waits for in a step between two reports, and the norm of its gradients as we and Megatron find it."""
    from llada_megatron.parallel.training.distributed_optimizer import gradient_norm

    with HostWaits() as waits:
        trainer = trainer_of(run)
        trainer._one_step(lambda: False)
        waits.forget()
        trainer._one_step(lambda: False)
        trainer.step.close()
        found = dict(waits.waits), str(waits)
        optimizer = trainer.state.optimizer
        norms = gradient_norm(optimizer), optimizer.get_grad_norm()
        assert waits.marked(norms[0])
    return *found, tuple(map(float, norms))


def on_a_rank(cases, layout, folder):
    from llada_megatron.parallel import topology

    topology.initialize(layout, 5)
    size = layout.data_parallel * MICROBATCHES
    runs = (parity_run(m, layout, global_batch_size=size, micro_batch_size=1, **options) for m, options in cases)
    reports = LoggingConfig(interval=8, tensorboard=False)
    return [waits_of_a_step(dataclasses.replace(run, output_dir=folder, logging=reports)) for run in runs]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    [results] = run_ranks(on_a_rank, 1, list(ALONE.values()), LayoutConfig(), str(tmp_path_factory.mktemp("alone")))
    return dict(zip(ALONE, results, strict=True))


def check(result, passes):
    waits, places, (ours, megatrons) = result
    known = OURS | MEGATRONS
    assert set(waits) <= set(known), f"not explained:\n{places}"
    assert {wait for wait in waits if wait.file.startswith("llada_megatron")} == set(OURS), places
    assert waits == {wait: known[wait](passes) for wait in waits}, places
    assert any("Event" in wait.what for wait in waits) == bool(passes)
    assert ours == pytest.approx(megatrons, rel=1e-6) and ours > 0


@pytest.mark.parametrize("name", ALONE)
def test_a_step_of_one_rank_waits_once_and_in_no_layer(alone, name):
    check(alone[name], 0)


@pytest.mark.parametrize(
    ("model", "layout", "options", "moe_layers"),
    [
        (DENSE, LayoutConfig(pipeline_parallel=2), {"precision": "bf16"}, 0),
        (
            SIGMOID,
            LayoutConfig(tensor_parallel=2, sequence_parallel=True, expert_parallel=2),
            {"recompute": "full", "precision": "bf16"},
            2 * MOE_LAYERS,
        ),
    ],
    ids=["PP2", "TP2.SP.EP2 recomputed"],
)
def test_a_step_waits_once_and_where_megatron_must(model, layout, options, moe_layers, tmp_path):
    for [result] in run_ranks(on_a_rank, layout.world_size, [(model, options)], layout, str(tmp_path)):
        check(result, MICROBATCHES * moe_layers)
