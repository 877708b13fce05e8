"""What a run writes down: every step once, whatever happened in between, with all that is promised."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.config.intervals import CheckpointConfig, LoggingConfig, ValidationConfig
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.model.flops import causal_keys, flops_per_token
from llada_megatron.llada_moe.model.patterns import CAUSAL, FULL, AttentionPattern
from llada_megatron.llada_moe.objectives import make_objective
from llada_megatron.llada_moe.objectives.block_diffusion import BlockDiffusionConfig
from llada_megatron.llada_moe.objectives.joint import JointConfig
from llada_megatron.llada_moe.planning.estimate import Assumptions, Estimate
from llada_megatron.llada_moe.planning.gpu_sheet import load_gpu
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.training.metrics_file import EXPERTS_FILE_NAME, read_metrics
from llada_megatron.parallel.training.reporter import Reporter
from tests.corpora import model_for, prepared_set
from tests.parallel.training.test_callbacks import Recorder
from tests.ranks import RankFailure, run_ranks

STEPS, FAILS_AFTER = 6, 5

EVERY_STEP = {"schema", "step", "consumed_sequences", "loss", "bits_per_byte", "grad_norm", "learning_rate"}

EVERY_INTERVAL = {
    "tokens_per_second",
    "seconds_per_step",
    "model_flops_utilization",
    "peak_memory_gb_all_ranks",
    "expert_load/max_over_mean",
    "expert_load/dead",
    "expert_load/entropy",
    "expert_load/rank_01",
    "expert_load/rank/step_share_lost",
    "router/z",
}


def train(run, fail_after):
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.training.trainer import Trainer

    topology.initialize(run.layout, run.training.seed)
    trainer = Trainer(run)

    def stop():
        if trainer.state.step == fail_after:
            raise RuntimeError("as if the power went")
        return False

    trainer.train(stop)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("reporting")
    _, tokenizer = prepared_set(root)
    return RunConfig(
        model=model_for(tokenizer),
        training=TrainingConfig(steps=STEPS, sequence_length=32, global_batch_size=4, precision="fp32"),
        data=DataConfig(sets=[DataSetConfig(path=str(root / "set"))], validation_fraction=0.2),
        optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-3)),
        layout=LayoutConfig(data_parallel=2, expert_parallel=2),
        checkpoint=CheckpointConfig(interval=4, keep_last=9),
        validation=ValidationConfig(interval=2, sequences=4),
        logging=LoggingConfig(interval=2, tensorboard=True, callbacks=[f"{Recorder.__module__}:Recorder"]),
        output_dir=str(root / "run"),
    )


def test_a_resumed_run_has_every_step_once_with_all_figures(run):
    with pytest.raises(RankFailure, match="as if the power went"):
        run_ranks(train, 2, run, FAILS_AFTER)
    assert [line["step"] for line in read_metrics(run.output_dir)] == [1, 2, 3, 4]
    run_ranks(train, 2, run, None)
    lines = read_metrics(run.output_dir)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    told = [json.loads(line) for line in (Path(run.output_dir) / "told.jsonl").read_text().splitlines()]
    assert [what for what, _ in told] == ["start", 1, 2, 3, 4, "start", *range(5, STEPS + 1), "end"]
    assert told[0][1] == 0 and told[5][1] == 4 and set(told[2][1]) == lines[1].keys() - {"schema", "step"}
    assert [line["consumed_sequences"] for line in lines] == [4 * step for step in range(1, STEPS + 1)]
    assert all(line.keys() >= EVERY_STEP for line in lines)
    with_figures = [line["step"] for line in lines if line.keys() >= EVERY_INTERVAL]
    assert with_figures == [2, 4, 6]
    assert [line["step"] for line in lines if "validation/bits_per_byte" in line] == [2, 4, 6]
    kept = {step: manifests.read(path).metadata for step, path in manifests.steps(Path(run.output_dir) / "checkpoints")}
    nats = {step: facts["validation"]["nats_per_token"] for step, facts in kept.items()}
    bits = {step: lines[step - 1]["validation/bits_per_byte"] for step in nats}
    assert nats.keys() == {4, 6} and nats[4] / nats[6] == pytest.approx(bits[4] / bits[6])
    assert any(name.startswith("loss_by_mask_ratio/") for name in lines[-1])
    layers = [name for name in lines[-1] if name.startswith("expert_load/layer_")]
    assert layers and all(lines[-1][name] is not None for name in layers)
    counts = read_metrics(run.output_dir, EXPERTS_FILE_NAME)
    assert [(line["step"], line["steps"]) for line in counts] == [(2, 2), (4, 2), (6, 2)]
    tokens = 2 * 4 * 32 * run.model.moe.top_k
    assert all(sum(map(sum, bins)) == tokens for line in counts for bins in line["tokens"].values())
    assert 0 < lines[-1]["model_flops_utilization"] < 1


@pytest.mark.parametrize(
    ("pattern", "copies", "said"),
    [
        (FULL, 1, "context parallel 2, full attention: the busiest rank has 1.33 times the mean's pairs of tokens"),
        (CAUSAL, 1, "context parallel 2, causal attention: the busiest rank has 1.29"),
        (AttentionPattern(4), 1, "context parallel 2, attention in blocks of 4: the busiest rank has 1.20"),
        (
            AttentionPattern(4, doubled=True),
            2,
            "context parallel 2, attention in blocks of 4 over two copies: the busiest",
        ),
    ],
)
def test_the_first_step_of_context_ranks_says_how_even_attention_is(pattern, copies, said):
    reporter = object.__new__(Reporter)  # without ranks
    messages = []
    reporter.message, reporter._first_step = messages.append, 0
    reporter.run = SimpleNamespace(layout=LayoutConfig(context_parallel=2))
    reporter.objective = SimpleNamespace(pattern=lambda step: pattern)
    reporter.callbacks, reporter._work = SimpleNamespace(start=lambda step: None), lambda pattern: 1.0
    boundaries = torch.tensor([0, 8, 12, 16, 24, 28, 32][: 1 + 3 * copies])
    batch = SimpleNamespace(boundaries=boundaries, inputs=torch.zeros(1, 16 * copies))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llada_megatron.parallel.training.reporter.on_rank_0", lambda work: work())
        reporter.start([batch])
        assert len(messages) == 1 and messages[0].startswith(said)
        reporter.run = SimpleNamespace(layout=LayoutConfig())
        reporter.start([batch])
        assert len(messages) == 1


@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(),
        BlockDiffusionConfig(kind="block_diffusion", block_size=32),
        JointConfig(kind="joint", block_size=32),
    ],
    ids=lambda objective: objective.kind,
)
def test_a_plan_counts_the_operations_that_the_run_will_report(objective):
    run = dataclasses.replace(load_run("llada-8b-pretrain"), objective=objective)
    planned = Estimate(run, load_gpu("h100"), Assumptions())
    assert planned.flops_per_step / planned.tokens_per_step == pytest.approx(reported_work(run, 0))


def reported_work(run, step):
    """Operations of a token in a step whose sequences are one document each."""
    objective, length = make_objective(run.objective, run.training), run.training.sequence_length
    reporter = object.__new__(Reporter)  # without ranks
    reporter.run, reporter.objective, reporter._works = run, objective, {}
    reporter._keys_per_query = lambda pattern: pattern.keys_per_query(length)
    return reporter._work(objective.pattern(step))


def test_every_row_of_a_step_that_learns_next_tokens_counts():
    run = load_run("ar-to-diffusion")
    length = run.training.sequence_length
    causal = flops_per_token(run.model, length, keys_per_query=causal_keys(length), supervised_share=1.0)
    assert reported_work(run, 0) == pytest.approx(causal.total)
