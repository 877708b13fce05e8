"""A run with both losses: its metrics name them, its validation says which is the bound, and a kill changes nothing."""

from __future__ import annotations

import dataclasses
import os
import signal
from types import SimpleNamespace

import pytest

from llada_megatron.llada_moe.config import validate_run
from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.config.intervals import CheckpointConfig, LoggingConfig, ValidationConfig
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.evaluation.likelihood import HeldOut, Likelihood
from llada_megatron.llada_moe.model.patterns import CAUSAL
from llada_megatron.llada_moe.objectives import make_objective
from llada_megatron.llada_moe.objectives.joint import JointConfig
from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint
from llada_megatron.parallel.training.metrics_file import read_metrics
from llada_megatron.parallel.training.reporter import Reporter
from llada_megatron.tools.bench import parity
from llada_megatron.tools.bench.layouts import MODELS, parity_run
from tests.corpora import model_for, prepared_set
from tests.ranks import RankFailure, run_ranks


def train(run, kill_at):
    """Train to the end, or until this rank is killed in step `kill_at`."""
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.training.trainer import Trainer

    topology.initialize(run.layout, run.training.seed)
    trainer = Trainer(run)

    def stop():
        if trainer.state.step == kill_at - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    trainer.train(stop)


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("joint")
    _, tokenizer = prepared_set(root)

    def make(name):
        return RunConfig(
            model=model_for(tokenizer, "tiny-dense"),
            training=TrainingConfig(steps=3, sequence_length=32, global_batch_size=4, precision="fp32"),
            data=DataConfig(sets=[DataSetConfig(path=str(root / "set"))], validation_fraction=0.2),
            optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-3)),
            objective=JointConfig(kind="joint", block_size=8),
            checkpoint=CheckpointConfig(interval=1, keep_last=9),
            validation=ValidationConfig(interval=3, sequences=2),
            logging=LoggingConfig(interval=1, tensorboard=False),
            output_dir=str(root / name),
        )

    return make


NAMES = ("loss", "loss_autoregressive", "loss_diffusion", "grad_norm")
BOUNDS = ("validation/bits_per_byte", "validation/diffusion_bits_per_byte")


def figures(run):
    *lines, last = read_metrics(run.output_dir)
    return [[line[name] for name in NAMES] for line in [*lines, last]], [last[name] for name in BOUNDS]


def test_both_losses_are_named_and_a_killed_run_goes_on_to_the_bit(make_run):
    whole, killed = make_run("whole"), make_run("killed")
    validate_run(whole)
    run_ranks(train, 1, whole, 0)
    steps, (exact, bound) = figures(whole)
    assert len(steps) == 3 and 0 < exact != bound
    for loss, autoregressive, diffusion, _ in steps:
        assert loss == pytest.approx(1.0 * autoregressive + 0.3 * diffusion, rel=1e-6)
    with pytest.raises(RankFailure):
        run_ranks(train, 1, killed, 2)
    run_ranks(train, 1, killed, 0)
    assert figures(killed) == figures(whole)
    with open_checkpoint(whole.output_dir) as loaded:
        assert loaded.model.pattern == CAUSAL


def test_a_validation_says_which_figure_is_the_bound():
    said, noted = [], {}
    reporter = SimpleNamespace(
        objective=make_objective(JointConfig(kind="joint", block_size=8)),
        progress=SimpleNamespace(message=said.append),
        note=noted.__setitem__,
    )
    found = HeldOut(100.0, 50, 2, Likelihood(130.0, 52, 2))
    bits = Reporter.validation(reporter, 3, found, 4.0)
    assert noted == {BOUNDS[0]: bits, BOUNDS[1]: found.drafted.bits_per_byte(4.0)}
    assert bits == found.bits_per_byte(4.0) < noted[BOUNDS[1]]
    exact, bound = noted.values()
    both = (
        f"{exact:.4f} bits per byte from left to right (exact), at most {bound:.4f} in blocks (the bound of diffusion)"
    )
    assert said == [f"step 3: validation {both} over 2 sequences"]


def costs(run):
    """Of held-out samples from left to right and in blocks, and the clean half's share of a step's loss."""
    import torch

    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.training import distributed_optimizer
    from llada_megatron.parallel.training.step import TrainingStep
    from llada_megatron.parallel.training.validation import validate

    topology.initialize(run.layout, run.training.seed)
    models = build.wrap(run, build.build_run_chunks(run))
    found = validate(run, make_objective(run.objective), models, parity.SyntheticData(run), 0)
    step = TrainingStep(run, models, distributed_optimizer.build_optimizer(run, models), parity.SyntheticData(run))
    clean = step.gradients(0).clean_loss
    torch.distributed.all_reduce(clean)
    return [found.nats, found.tokens, found.drafted.nats, found.drafted.tokens, float(clean)]


def test_figures_of_both_halves_are_the_same_where_a_rank_holds_parts_of_both():
    run = parity_run(MODELS["dense"], LayoutConfig(), objective="joint", block_size=4)
    run = dataclasses.replace(run, validation=ValidationConfig(interval=1, sequences=6))
    (alone,) = run_ranks(costs, 1, run)
    assert alone[1] < alone[3]  # the first token of a document is no next one
    for found in run_ranks(costs, 2, dataclasses.replace(run, layout=LayoutConfig(context_parallel=2))):
        assert found == pytest.approx(alone, rel=1e-5)
