"""A run without any balancing: its experts die, the report finds them, and each piece of advice does what it says."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re

import pytest
import torch

from llada_megatron import cli
from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.config.intervals import CheckpointConfig, LoggingConfig, ValidationConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.parallel.training.metrics_file import EXPERTS_FILE_NAME, read_metrics
from tests.corpora import model_for, prepared_set
from tests.ranks import run_ranks

STEPS, RANKS = 24, 2


def train(run):
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.training.trainer import Trainer

    topology.initialize(run.layout, run.training.seed)
    Trainer(run).train(lambda: False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained run whose routers had neither a balance loss nor a moving bias."""
    root = tmp_path_factory.mktemp("unbalanced")
    _, tokenizer = prepared_set(root)
    model = model_for(tokenizer)
    moe = dataclasses.replace(model.moe, num_experts=16, top_k=2, num_expert_groups=1, expert_groups_top_k=1)
    run = RunConfig(
        model=dataclasses.replace(model, moe=moe, num_layers=3),
        training=TrainingConfig(steps=STEPS, sequence_length=64, global_batch_size=8, precision="fp32"),
        data=DataConfig(sets=[DataSetConfig(path=str(root / "set"))], validation_fraction=0.2),
        optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=4e-3)),
        checkpoint=CheckpointConfig(interval=STEPS),
        validation=ValidationConfig(interval=STEPS, sequences=4),
        logging=LoggingConfig(interval=4),
        output_dir=str(root / "run"),
    )
    run_ranks(train, 1, run)
    return run


def experts(run, checkpoint, *options):
    """JSON and text of the command."""
    data = ["--data", run.data.sets[0].path, "--tokens", "2048", "--length", "64", "--ratios", "0.3,0.7"]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.main(["experts", str(checkpoint), *data, *options, "--json"]) == 0
    *lines, last = printed.getvalue().splitlines()
    return json.loads(last), "\n".join(lines)


def dead(profile):
    return sum(layer["dead"] for layer in profile["layers"].values())


def logits(checkpoint):
    from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint

    with open_checkpoint(checkpoint) as loaded:
        tokens = torch.randint(4, 16, (1, 32), generator=torch.Generator().manual_seed(0))
        bounds = torch.tensor([0, 32], dtype=torch.int32)
        return loaded.logits(tokens, torch.ones(1, 32, dtype=torch.bool), bounds).flatten().tolist()


def test_the_advice_brings_dead_experts_back(run, tmp_path):
    last = read_metrics(run.output_dir, EXPERTS_FILE_NAME)[-1]
    counts = [[sum(column) for column in zip(*bins, strict=True)] for bins in last["tokens"].values()]
    assert sum(row.count(0) for row in counts) > 0  # they are seen while it trains
    found, text = experts(run, run.output_dir)
    assert dead(found) > 0 and f"{dead(found)} of 32 experts received no token of this text" in text
    _, advice = experts(run, run.output_dir, "--advise", str(RANKS))
    command = re.search(r"--try bias --output FOLDER", advice)[0].replace("FOLDER", str(tmp_path / "balanced"))
    tried, _ = experts(run, run.output_dir, *command.split())
    assert tried["measured"] < tried["before"] / 2 and tried["measured"] == pytest.approx(tried["expected"], rel=0.3)
    assert dead(experts(run, tmp_path / "balanced")[0]) == 0


def test_a_placement_does_what_was_predicted_and_leaves_the_function(run, tmp_path):
    before, _ = experts(run, run.output_dir)
    command = ["--try", f"placement={RANKS}", "--output", str(tmp_path / "placed")]
    tried, _ = experts(run, run.output_dir, *command)
    assert tried["expected"] <= tried["before"] and tried["error"] < 0.1
    assert logits(tmp_path / "placed") == pytest.approx(logits(run.output_dir), abs=1e-4)
    placed, _ = experts(run, tmp_path / "placed")
    for layer, order in tried["placement"].items():
        loads = before["layers"][layer]["tokens"]
        assert placed["layers"][layer]["tokens"] == [loads[expert] for expert in order]
