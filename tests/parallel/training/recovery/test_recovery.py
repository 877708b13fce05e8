"""Bad steps in real runs on two ranks: what is used, what is left out, and that a kill in between changes nothing."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.config.intervals import CheckpointConfig, LoggingConfig
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.recovery import RecoveryConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.parallel.training.heartbeat import FOLDER_VARIABLE, read_heartbeats
from llada_megatron.parallel.training.metrics_file import read_metrics
from llada_megatron.tools.bench.layouts import SIGMOID, parity_run
from tests.corpora import model_for, prepared_set
from tests.ranks import RankFailure, run_ranks

STEPS, INTERVAL, ALWAYS = 8, 3, 99

LAYOUTS = {
    "EP2": ("tiny-moe", LayoutConfig(data_parallel=2, expert_parallel=2), "fp32"),  # two optimizers, moving biases
    "DP2": ("tiny-dense", LayoutConfig(data_parallel=2), "bf16"),  # one optimizer, main weights of its own
}

DEFAULT = RecoveryConfig()

BACK = RecoveryConfig(not_finite="rollback")

SLOWER = dataclasses.replace(BACK, learning_rate_factor=0.25, skip_steps=2)


def _train(run, faults, spike_at=None, kill_at=None):
    """Train; rank 1 spoils its gradients in `faults` {step: how often}. Returns the weights and the history.

    `kill_at`: end without a farewell in this step once a decision has been taken.
    """
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.training.trainer import Trainer

    os.environ[FOLDER_VARIABLE] = f"{run.output_dir}/beats"
    topology.initialize(run.layout, run.training.seed)
    trainer, left = Trainer(run), dict(faults)
    gradients, history = trainer.step.gradients, trainer.state.history

    def spoilt(step):
        losses = gradients(step)
        if dist.get_rank() == 1 and left.get(step + 1, 0) > 0:
            for parameter in trainer.models[0].parameters():
                parameter.main_grad.fill_(math.nan)
        if step + 1 == spike_at:
            losses.loss *= 100
        left[step + 1] = left.get(step + 1, 0) - 1
        return losses

    def stop():
        if trainer.state.step + 1 == kill_at and trainer.state.history.counted:
            raise RuntimeError("as if the power went")
        return False

    trainer.step.gradients = spoilt
    trainer.train(stop)
    tensors = {**dict(trainer.models[0].named_parameters()), **dict(trainer.models[0].named_buffers())}
    kept = {name: tensor.detach().clone() for name, tensor in tensors.items() if not name.endswith("tokens_per_expert")}
    history = trainer.state.history
    return kept, history.losses, [(decision.kind, decision.step, decision.back_to) for decision in history.decisions]


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("recovery")
    _, tokenizer = prepared_set(root)

    def make(name, layout="EP2", recovery=DEFAULT, steps=STEPS):
        name_of_model, spread, precision = LAYOUTS[layout]
        model = model_for(tokenizer, name_of_model)
        if model.moe is not None:
            model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, expert_bias_update_rate=0.01))
        return RunConfig(
            model=model,
            training=TrainingConfig(steps=steps, sequence_length=32, global_batch_size=4, precision=precision, seed=3),
            data=DataConfig(sets=[DataSetConfig(path=str(root / "set"))]),
            optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-3, warmup_steps=2)),
            layout=spread,
            checkpoint=CheckpointConfig(interval=INTERVAL, keep_last=2),
            logging=LoggingConfig(interval=2, tensorboard=False),
            recovery=recovery,
            output_dir=str(root / name),
        )

    return make


def in_background(run):
    """With a save, and a copy, that may not be at its end when the run goes back."""
    saving = dataclasses.replace(run.checkpoint, asynchronous=True, copy_to=f"{run.output_dir}-copy")
    return dataclasses.replace(run, checkpoint=saving)


def lines(run):
    """What the metrics say of each step, without what depends on the clock."""
    kept = ("step", "loss", "skipped", "learning_rate", "grad_norm", "recovery/decisions")
    return [{key: line[key] for key in kept if key in line} for line in read_metrics(run.output_dir)]


def same(found, expected):
    """Weights and biases bit for bit on every rank, and the same losses remembered."""
    for (weights, losses, _), (expected_weights, expected_losses, _) in zip(found, expected, strict=True):
        assert weights.keys() == expected_weights.keys()
        assert [name for name in weights if not torch.equal(weights[name], expected_weights[name])] == []
        assert losses == expected_losses
    return True


@pytest.fixture(scope="module")
def calm(make_run):
    """An undisturbed run of a layout, and what it ended in."""

    @functools.cache
    def of(layout):
        run = make_run(f"calm-{layout}", layout)
        return run, run_ranks(_train, 2, run, {})

    return of


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_passing_fault_leaves_no_trace_in_the_weights(make_run, calm, layout):
    (undisturbed, expected), disturbed = calm(layout), make_run(f"passing-{layout}", layout)
    found = run_ranks(_train, 2, disturbed, {2: 1, 5: 1})
    assert same(found, expected) and lines(disturbed) == lines(undisturbed)
    assert {tuple(decisions) for _, _, decisions in found} == {(("retry", 2, None), ("retry", 5, None))}
    assert any("expert_bias" in name and tensor.any() for name, tensor in found[0][0].items()) == (layout == "EP2")
    beats = read_heartbeats(Path(disturbed.output_dir, "beats"))
    assert {rank: (beat.step, beat.phase) for rank, beat in beats.items()} == {0: (STEPS, "done"), 1: (STEPS, "done")}


def test_a_bad_step_ends_the_run_before_its_update_and_says_what_to_do(make_run, calm):
    run = make_run("stop")
    with pytest.raises(RankFailure) as failure:
        run_ranks(_train, 2, run, {6: ALWAYS})
    for part in ("step 6 is not finite", "a second run", "samples 20 to 23", "recovery.not_finite=rollback"):
        assert part in str(failure.value)
    assert [line["step"] for line in lines(run)] == [1, 2, 3, 4, 5]  # also those since the last interval
    run_ranks(_train, 2, run, {})  # whoever did it is gone: it goes on
    assert lines(run) == lines(calm("EP2")[0])


@pytest.mark.parametrize(("layout", "bad", "back_to"), [("EP2", 5, 3), ("DP2", 2, 0)])
def test_going_back_is_skipping_with_other_rates(make_run, layout, bad, back_to):
    skipping = make_run(f"skip-{layout}", layout, RecoveryConfig(not_finite="skip", retry=False))
    going_back = in_background(make_run(f"back-{layout}", layout, BACK))
    expected = run_ranks(_train, 2, skipping, {bad: ALWAYS})
    found = run_ranks(_train, 2, going_back, {bad: ALWAYS})
    assert same(found, expected)
    assert expected[0][2] == [("skip", bad, None)] and found[1][2] == [("rollback", bad, back_to)]
    for run in (skipping, going_back):
        assert [line["step"] for line in lines(run)] == list(range(1, STEPS + 1))
        assert [line["step"] for line in lines(run) if line.get("skipped")] == [bad]
        assert [line["step"] for line in lines(run) if "loss" not in line] == [bad]
    assert next(line["step"] for line in lines(going_back) if "recovery/decisions" in line) == back_to + 1


@pytest.fixture(scope="module")
def slower(make_run):
    """A run that went back from step 5 to 3, without steps 4 and 5, at a quarter of the rate; and what it ended in."""
    run = make_run("slower", recovery=SLOWER)
    found = run_ranks(_train, 2, run, {5: ALWAYS})
    assert [line.get("skipped") for line in lines(run)] == [None, None, None, 1, 1, None, None, None]
    assert [line["learning_rate"] for line in lines(run)] == pytest.approx([5e-4, 1e-3, 1e-3] + [2.5e-4] * 5)
    return run, found


@pytest.mark.parametrize(("kill_at", "journal"), [(6, True), (8, False)], ids=["before a save", "after one"])
def test_a_kill_after_going_back_forgets_nothing(make_run, slower, kill_at, journal):
    run = make_run(f"killed-{kill_at}", recovery=SLOWER)
    with pytest.raises(RankFailure, match="as if the power went"):
        run_ranks(_train, 2, run, {5: ALWAYS}, None, kill_at)
    if not journal:  # the checkpoint holds it all
        Path(run.output_dir, "recovery.jsonl").unlink()
    found = run_ranks(_train, 2, run, {})
    assert same(found, slower[1]) and found[0][2] == slower[1][0][2] == [("rollback", 5, 3)]
    assert lines(run) == lines(slower[0])


def test_decisions_are_bounded(make_run):
    run = make_run("bounded", recovery=dataclasses.replace(BACK, max_decisions=2))
    with pytest.raises(
        RankFailure, match=r"step 7 is not finite.*rollback to 3 at step 5; rollback to 3 at step 6.*All 2"
    ):
        run_ranks(_train, 2, run, {5: ALWAYS, 6: ALWAYS, 7: ALWAYS})


def test_a_spike_is_left_out_and_never_part_of_the_window(make_run):
    policy = RecoveryConfig(spike="skip", spike_window=8, retry=False)
    (_, losses, decisions), _ = run_ranks(_train, 2, make_run("spike", "DP2", policy, steps=11), {}, 10)
    assert decisions == [("skip", 10, None)]
    assert len(losses) == 8 and max(losses) < 3 * min(losses)


def _two_updates(run, ours):
    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.training import distributed_optimizer
    from llada_megatron.parallel.training.step import TrainingStep
    from llada_megatron.tools.bench.parity import SyntheticData

    topology.initialize(run.layout, run.training.seed)
    models = build.wrap(run, build.build_run_chunks(run))
    step = TrainingStep(run, models, distributed_optimizer.build_optimizer(run, models), SyntheticData(run))
    norms = []
    for number in range(2):
        distributed_optimizer.set_learning_rate(run, step.optimizer, number + 1)
        if ours:
            norms.append(step(number).grad_norm)
        else:
            step.gradients(number)
            norms.append(float(step.optimizer.step()[1]))
    return norms, [parameter.detach().clone() for parameter in models[0].parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_after_the_verdict_is_that_of_megatrons_step(precision):
    run = parity_run(SIGMOID, LAYOUTS["EP2"][1], global_batch_size=4, precision=precision)
    run = dataclasses.replace(run, optimizer=dataclasses.replace(run.optimizer, clip_grad_norm=0.1))
    (norms, ours), (expected_norms, megatrons) = (run_ranks(_two_updates, 2, run, which)[1] for which in (True, False))
    assert norms == expected_norms and min(norms) > 0.1  # clipped
    assert all(map(torch.equal, ours, megatrons))
