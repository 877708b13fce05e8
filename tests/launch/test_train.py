"""`llada train` from the command line: the result, Ctrl-C and how to go on, torchrun, a rank that fails."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from llada_megatron.llada_moe.config import load_run
from tests.corpora import prepare_texts, write_texts

RUN = """
model: {base: tiny-moe-softmax, vocab_size: 400}
training: {steps: 3, sequence_length: 32, global_batch_size: 4, precision: fp32}
data: {sets: [{path: corpus}], validation_fraction: 0.1}
optimizer: {learning_rate: {peak: 1e-3}}
layout: {data_parallel: 2, expert_parallel: 2}
checkpoint: {interval: 100}
logging: {interval: 1, tensorboard: false}
output_dir: out
"""
LLADA = ["-m", "llada_megatron.cli"]
FINISHED = ["output_dir=result", "objective.block_size=8"]


def _run(*command, cwd, **variables):
    environment = os.environ | {"NO_COLOR": "1"} | variables
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a prepared corpus and run.yaml."""
    folder = tmp_path_factory.mktemp("train")
    (folder / "run.yaml").write_text(RUN)
    prepare_texts(folder, write_texts(folder))
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    """A run to its end, with block-causal attention, in `result`; what it printed."""
    done = _run(*LLADA, "train", "run.yaml", *FINISHED, "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done


def test_block_causal_attention_trains_and_is_remembered(folder, finished):
    assert json.loads(finished.stdout)["steps"] == 3
    assert load_run(folder / "result/config.yaml").objective.block_size == 8


def test_the_result_is_on_stdout_and_everything_else_elsewhere(folder, finished):
    done = finished
    result = json.loads(done.stdout)
    assert (result["steps"], result["stopped"]) == (3, False)
    assert done.stderr.startswith("result: ") and "2 processes" in done.stderr.splitlines()[0]
    assert "step 3/3" in done.stderr and "% of " in done.stderr and "saved step 3, training paused" in done.stderr
    assert "FLOPs" not in done.stderr and "FLOPs/token" in (folder / "result/logs/rank-0.log").read_text()
    assert "Warning" not in done.stderr
    assert (folder / "result/logs/rank-1.log").exists()
    assert load_run(folder / "result/config.yaml") == load_run(folder / "run.yaml", FINISHED)


def test_ctrl_c_saves_and_says_how_to_go_on(folder):
    command = [*LLADA, "train", "run.yaml", "output_dir=stopped"]
    process = subprocess.Popen(
        [sys.executable, *command, "training.steps=100000"], cwd=folder, stderr=subprocess.PIPE, text=True
    )
    metrics, deadline = folder / "stopped/metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "llada train run.yaml output_dir=stopped training.steps=100000" in err.splitlines()[-1]
    saved = int((folder / "stopped/checkpoints/latest").read_text().strip().rpartition("-")[2])
    assert f"stopped after step {saved}" in err
    again = _run(*command, f"training.steps={saved + 1}", "--json", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert f"at step {saved}" in again.stderr
    assert json.loads(again.stdout)["steps"] == saved + 1


def test_under_torchrun_rank_0_speaks(folder):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = _run(*torchrun, *LLADA, "train", "run.yaml", "output_dir=joined", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3
    assert done.stderr.count("step 3/3") == 1


def test_a_rank_that_fails_is_named(folder):
    """The output directory cannot be written: a failure on the ranks, after the checks of the parent."""
    (folder / "blocked").mkdir()
    (folder / "blocked/metrics.jsonl").mkdir()
    done = _run(*LLADA, "train", "run.yaml", "output_dir=blocked", cwd=folder)
    assert done.returncode == 1
    assert "error: rank 0 (dp 0, pp 0, tp 0, cp 0, ep 0): IsADirectoryError" in done.stderr
    assert "full stack: blocked/logs/rank-0.log" in done.stderr
    assert "Traceback" not in done.stderr
    shown = _run(*LLADA, "train", "run.yaml", "output_dir=blocked", "--traceback", cwd=folder)
    assert "on the rank:\nTraceback" in shown.stderr
