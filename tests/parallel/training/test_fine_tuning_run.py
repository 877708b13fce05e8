"""A run of fine-tuning as the trainer runs it: figures, remarks, and the template beside the checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from pathlib import Path

import pytest

from llada_megatron.cli import main
from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.config.intervals import CheckpointConfig, LoggingConfig, ValidationConfig
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.data.tokenizer_files import load_tokenizer
from llada_megatron.llada_moe.objectives.fine_tuning import FineTuningConfig
from llada_megatron.parallel.sampling.chat_template import LLADA, find_template
from llada_megatron.parallel.training.metrics_file import read_metrics
from llada_megatron.tools.bench import cap
from tests.launch.sampling.checkpoints import VOCABULARY, run_cli, tokenizer_in
from tests.ranks import run_ranks


def train(run):
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.training.trainer import Trainer

    topology.initialize(run.layout, run.training.seed)
    trainer = Trainer(run)
    return trainer.objective.remarks(), trainer.train(lambda: False)["loss"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("chats")
    tokenizer_in(root, LLADA)
    draw = random.Random(0)
    records = [
        {"messages": [{"role": "user", "content": "q" * size}, {"role": "assistant", "content": "a" * (1 + size % 9)}]}
        for size in [*(draw.randint(1, 20) for _ in range(30)), 40, 300]
    ]
    (root / "chats.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    command = ["prepare", str(root / "chats.jsonl"), "--chat", "--output", str(root / "set")]
    assert main([*command, "--tokenizer", str(root / "tokenizer.json")]) == 0
    return RunConfig(
        model=dataclasses.replace(load_model("tiny-dense"), vocab_size=VOCABULARY),
        training=TrainingConfig(steps=3, sequence_length=64, global_batch_size=4, precision="fp32"),
        data=DataConfig(sets=[DataSetConfig(path=str(root / "set"))], validation_fraction=0.2),
        optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=1e-3)),
        objective=FineTuningConfig(kind="sft", complementary_masks=True, confidence_coefficient=0.1),
        layout=LayoutConfig(data_parallel=2),
        checkpoint=CheckpointConfig(interval=3),
        validation=ValidationConfig(interval=3, sequences=4),
        logging=LoggingConfig(interval=1, tensorboard=False),
        output_dir=str(root / "run"),
    )


@pytest.fixture(scope="module")
def trained(run):
    return run_ranks(train, 2, run)[0]


def test_it_trains_validates_says_what_is_too_long_and_carries_the_template(run, trained):
    remarks, _ = trained
    assert any("longer than training.sequence_length 64" in remark for remark in remarks)
    lines = read_metrics(run.output_dir)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["validation/loss"] > 0
    assert not any(key.startswith(("bits", "validation/bits", "loss_by_mask_ratio")) for key in lines[-1])
    template = find_template(load_tokenizer(Path(run.output_dir) / "tokenizer"), None)
    assert template.template == LLADA


def test_the_benchmarks_ask_the_model_and_continue_its_run(run, trained, tmp_path, capsys, monkeypatch):
    """An untrained model gives no right answer, so that there is nothing to compare."""
    monkeypatch.setattr(cap, "THRESHOLDS", (0.5,))
    code, out, err = run_cli(capsys, "bench", "words", run.output_dir, "--questions", "3", "--json", "--require")
    assert code == 1 and "protocol: 3 questions about words that are in no conversation" in err
    (format_claim, *_) = json.loads(out.splitlines()[-1])["claims"]
    assert format_claim["value"] == 0.0 and format_claim["holds"] is False and "not in the format: " in err
    command = ["bench", "cap", run.output_dir, "--questions", "2", "--output", str(tmp_path), "--steps"]
    code, _, err = run_cli(capsys, *command, "2")
    assert code == 2 and "no answer is right after --steps 2 without confidence" in err
    assert [line["step"] for line in read_metrics(tmp_path / "without-confidence")] == [1, 2]
    for options, said in ((("0",), "--steps 0: at least 1"), (("2", "--coefficient", "0"), "--coefficient 0: greater")):
        code, _, err = run_cli(capsys, *command, *options)
        assert code == 2 and said in err
    parser = argparse.ArgumentParser()
    cap.add_arguments(parser)
    without, confident = cap.continuations(parser.parse_args([run.output_dir, "--coefficient", "3"])).values()
    assert without.objective.confidence_coefficient == 0.0 and confident.objective.confidence_coefficient == 3.0
    assert dataclasses.replace(confident, objective=without.objective, output_dir=without.output_dir) == without
    assert without.checkpoint.load.endswith("step-00000003") and without.layout == LayoutConfig()
