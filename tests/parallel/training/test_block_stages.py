"""A run over block sizes, killed in every stage, goes on to the bit; its checkpoint knows the size to sample with."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from llada_megatron.llada_moe.config import validate_run
from llada_megatron.llada_moe.config.block_schedule import BlockSchedule, BlockStage
from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.config.intervals import CheckpointConfig, LoggingConfig, ValidationConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.model.patterns import CAUSAL, FULL, AttentionPattern
from llada_megatron.llada_moe.objectives.block_diffusion import BlockDiffusionConfig
from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint
from llada_megatron.parallel.checkpoint.manifest import steps
from llada_megatron.parallel.evaluation.query_scorer import kind_of
from llada_megatron.parallel.sampling.session import Session
from llada_megatron.parallel.sampling.settings import Settings
from llada_megatron.parallel.training.metrics_file import read_metrics
from llada_megatron.tools.convert.exporter import ExportOptions, export_checkpoint
from llada_megatron.tools.convert.logits import token_ids
from llada_megatron.tools.convert.merger import _difference
from llada_megatron.tools.convert.sharded_source import ShardedSource
from llada_megatron.tools.experts.profiling import _usable
from tests.corpora import model_for, prepared_set
from tests.ranks import RankFailure, run_ranks

STAGES = ((4, 2), (32, 2), (8, 2))
STEPS, TOKENS = 8, 32 * 4


def train(run, kill_at):
    """Train to the end, or until this rank is killed in step `kill_at`; the step it began with, and its objective."""
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.training.trainer import Trainer

    topology.initialize(run.layout, run.training.seed)
    trainer = Trainer(run)
    first = trainer.state.step

    def stop():
        if kill_at and trainer.state.step == kill_at - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    trainer.train(stop)
    return first, trainer.objective.state()


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    root = tmp_path_factory.mktemp("stages")
    _, tokenizer = prepared_set(root)
    (small, *_), (whole, _), (last, _) = STAGES

    def make(name):
        return RunConfig(
            model=model_for(tokenizer, "tiny-dense"),
            training=TrainingConfig(steps=STEPS, sequence_length=32, global_batch_size=4, precision="fp32"),
            data=DataConfig(sets=[DataSetConfig(path=str(root / "set"))], validation_fraction=0.2),
            optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-3)),
            objective=BlockDiffusionConfig(
                kind="block_diffusion",
                block_size=last,
                block_schedule=BlockSchedule(
                    autoregressive_tokens=2 * TOKENS,
                    warmup=[BlockStage(block_size=small, tokens=2 * TOKENS)],
                    stable=BlockStage(block_size=whole, tokens=2 * TOKENS),
                    decay=[BlockStage(block_size=last, tokens=2 * TOKENS)],
                ),
            ),
            checkpoint=CheckpointConfig(interval=1, keep_last=9),
            validation=ValidationConfig(interval=2, sequences=2),
            logging=LoggingConfig(interval=1, tensorboard=False),
            output_dir=str(root / name),
        )

    return make


def figures(run):
    lines = [line for line in read_metrics(run.output_dir) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    validated = [{name: line[name] for name in sorted(line) if name.startswith("validation/")} for line in lines]
    assert all(bool(found) == (line["step"] % 2 == 0) for line, found in zip(lines, validated, strict=True))
    return [(line["loss"], line["grad_norm"], found) for line, found in zip(lines, validated, strict=True)]


def test_a_run_killed_inside_every_stage_goes_on_to_the_bit(make_run, tmp_path):
    whole, killed = make_run("whole"), make_run("killed")
    validate_run(whole)
    run_ranks(train, 1, whole, None)
    for step in (2, 4, 6, 8):
        with pytest.raises(RankFailure):
            run_ranks(train, 1, killed, step)
    ((first, state),) = run_ranks(train, 1, killed, None)
    assert first in (6, 7) and state == {"stage": 2, "block_size": 8}
    assert figures(killed) == figures(whole)
    with open_checkpoint(whole.output_dir) as loaded:
        assert loaded.model.pattern == AttentionPattern(8)
        assert kind_of(loaded).fills_masks and _usable(loaded, [0.5]) == [0.5]
        assert Session(loaded, Settings(checkpoint=whole.output_dir)).choice.grid == 8
    checkpoints = dict(steps(Path(whole.output_dir) / "checkpoints"))
    for step, size, pattern in ((4, 4, AttentionPattern(4)), (6, None, FULL)):
        with open_checkpoint(checkpoints[step]) as loaded:
            assert loaded.model.pattern == pattern
            assert Session(loaded, Settings(checkpoint=str(checkpoints[step]))).choice.grid == size
        assert ShardedSource(checkpoints[step]).objective.block_size == size
        assert not _difference(ShardedSource(checkpoints[step]), ShardedSource(checkpoints[8]))[1], "may be merged"
    first = checkpoints[1]
    assert _difference(ShardedSource(first), ShardedSource(checkpoints[8]))[0] == "objectives"
    with open_checkpoint(first) as loaded:
        assert loaded.model.pattern == CAUSAL
        with pytest.raises(ConfigError, match="is an autoregressive model; sampling fills masks of a diffusion model"):
            Session(loaded, Settings(checkpoint=str(first)))
        assert not kind_of(loaded).fills_masks and _usable(loaded, [0.5]) == [0.0]
    source = ShardedSource(first)
    assert loaded.run.model.mask_token_id not in token_ids(source, source, None)[0]
    notes = export_checkpoint(first, tmp_path / "exported", ExportOptions(without_tokenizer=True))["notes"]
    assert any("these weights were trained with causal attention" in note for note in notes)
    known = json.loads((tmp_path / "exported/generation_config.json").read_text())
    assert known["attention_pattern"] == "causal" and "block_length" not in known
