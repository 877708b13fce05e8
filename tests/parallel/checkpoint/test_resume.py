"""A run killed with SIGKILL goes on as if nothing had happened; under another layout, within rounding."""

import dataclasses
import json
import os
import random
import shutil
import signal
import threading
from pathlib import Path

import pytest
from torch import distributed as dist

from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.config.intervals import CheckpointConfig, LoggingConfig
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from tests.corpora import model_for, prepared_set
from tests.ranks import RankFailure, run_ranks

STEPS, INTERVAL = 6, 2
EXPERTS = LayoutConfig(data_parallel=2, expert_parallel=2)
TENSOR = LayoutConfig(tensor_parallel=2, sequence_parallel=True)


def _train(run, kill_after):
    """Train to the end, or until rank 1 is killed at some moment around step number `kill_after`; the steps taken."""
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.training.trainer import Trainer

    topology.initialize(run.layout, run.training.seed)
    trainer = Trainer(run)
    first = trainer.state.step

    def stop():
        if kill_after and trainer.state.step == kill_after - 1 and dist.get_rank() == 1:
            delay = random.Random(run.output_dir[-1]).uniform(0.0, 0.2)
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return False

    trainer.train(stop)
    return first, trainer.state.step


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    manifest, tokenizer = prepared_set(root)
    assert manifest.tokens > 1000
    model = model_for(tokenizer)
    # so that the router's biases, which the optimizer does not hold, change and must be restored
    model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, expert_bias_update_rate=0.01))

    def make(name, layout=EXPERTS, asynchronous=False):
        return RunConfig(
            model=model,
            training=TrainingConfig(steps=STEPS, sequence_length=32, global_batch_size=4, precision="fp32", seed=3),
            data=DataConfig(sets=[DataSetConfig(path=str(root / "set"))]),
            optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-3, warmup_steps=2)),
            layout=layout,
            checkpoint=CheckpointConfig(interval=INTERVAL, keep_last=9, asynchronous=asynchronous),
            logging=LoggingConfig(interval=1, tensorboard=False),
            output_dir=str(root / name),
        )

    return make


def _losses(run):
    lines = [json.loads(line) for line in Path(run.output_dir, "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))  # none missing, none twice
    return [(line["loss"], line["grad_norm"]) for line in steps]


@pytest.fixture(scope="module")
def unkilled(make_run):
    run = make_run("unkilled")
    assert run_ranks(_train, 2, run, None) == [(0, STEPS)] * 2
    return _losses(run)


@pytest.mark.parametrize(("asynchronous", "kill_after"), [(False, 3), (True, 4)], ids=["writing at once", "behind"])
def test_a_killed_run_resumes_bit_for_bit(make_run, unkilled, asynchronous, kill_after):
    run = make_run(f"killed-{kill_after}", asynchronous=asynchronous)
    with pytest.raises(RankFailure):
        run_ranks(_train, 2, run, kill_after)
    (first, last), _ = run_ranks(_train, 2, run, None)
    assert first in range(INTERVAL, kill_after + 1, INTERVAL) and last == STEPS
    assert _losses(run) == unkilled


def test_a_killed_run_resumes_under_another_layout(make_run, unkilled):
    killed = make_run("killed")
    with pytest.raises(RankFailure):
        run_ranks(_train, 2, killed, 5)
    for name, layout in (("killed-tensor", TENSOR), ("killed-one", LayoutConfig())):
        run = make_run(name, layout)
        shutil.copytree(killed.output_dir, run.output_dir)
        assert run_ranks(_train, layout.world_size, run, None)[0] == (4, STEPS)
        for (loss, norm), (expected_loss, expected_norm) in zip(_losses(run), unkilled, strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            assert norm == pytest.approx(expected_norm, rel=1e-4)
