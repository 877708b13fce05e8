"""The first line of a training: what runs, and about how long, in units that people read."""

import dataclasses

import pytest
import torch

from llada_megatron.console import count_text, rate_text
from llada_megatron.launch import announcement as module
from llada_megatron.launch.announcement import announcement, duration_text
from llada_megatron.launch.ranks import training_rank
from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.config.fp8 import FP8Config
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.llada_moe.model import accelerations
from llada_megatron.llada_moe.model.accelerations import Acceleration
from llada_megatron.llada_moe.model.flops import flops_per_token
from llada_megatron.parallel import topology
from llada_megatron.parallel.fp8 import recipes


@pytest.fixture
def demo(tmp_path):
    return dataclasses.replace(load_run("configs/runs/demo.yaml"), output_dir=str(tmp_path / "mine"))


def test_one_line_with_everything(demo, monkeypatch):
    steps, tokens = demo.training.steps, demo.training.global_batch_size * demo.training.sequence_length
    monkeypatch.setattr(module, "_cpu_peak", lambda run: 134e9)
    line = announcement(demo)
    assert "\n" not in line and line.startswith("mine: llada_moe model, ")
    assert "2 processes (data_parallel 2, expert_parallel 2)" in line
    assert f"{steps:,} steps of {tokens:,} tokens = {count_text(steps * tokens)} tokens" in line
    seconds = steps * tokens * flops_per_token(demo.model, demo.training.sequence_length).total / (0.25 * 134e9)
    assert f"about {duration_text(seconds)} if it reaches 25% of the measured 134 GFLOP/s" in line
    assert line.endswith("mine/logs")
    assert "known after the first steps" in announcement(demo, here=False)


def test_a_run_that_goes_on_takes_its_own_pace(demo, tmp_path):
    (tmp_path / "mine/checkpoints/step-00000100").mkdir(parents=True)
    (tmp_path / "mine/metrics.jsonl").write_text('{"step": 100, "seconds_per_step": 2.0}\n')
    run = dataclasses.replace(demo, training=dataclasses.replace(demo.training, steps=400))
    assert "300 of 400 steps" in announcement(run) and "about 10 min at its pace so far" in announcement(run)
    run = dataclasses.replace(demo, training=dataclasses.replace(demo.training, steps=100))
    assert "nothing is left to train" in announcement(run)


def test_the_peak_of_all_ranks(demo, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "available_cores", lambda: 8)
    monkeypatch.setattr(module, "threads_per_rank", lambda ranks: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr("llada_megatron.parallel.training.peak.matmul_peak", lambda *_: 10e9)
    assert module._cpu_peak(demo) == 40e9
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert module._cpu_peak(demo) is None


def test_units():
    durations = {0.4: "0.4 s", 45: "45 s", 100: "1.7 min", 372: "6.2 min", 11_520: "3.2 h", 1_036_800: "12 days"}
    assert {seconds: duration_text(seconds) for seconds in durations} == durations
    assert [rate_text(v) for v in (1.3414e11, 9.89e14)] == ["134 GFLOP/s", "989 TFLOP/s"]
    assert [count_text(v) for v in (512, 3_033_856, 2.3e12)] == ["512", "3.03 M", "2.3 T"]


ENGINE = Acceleration(True, "linear layers, norms", "2.20.2")
BROKEN = Acceleration(False, "installed, but its import fails: ImportError: undefined symbol", "2.20.2")
ABSENT, APEX = Acceleration(False, "not installed"), Acceleration(True, "Adam", "0.1")


@pytest.mark.parametrize(
    ("cuda", "engine", "apex", "line"),
    [
        (False, BROKEN, ABSENT, None),
        (True, ENGINE, ABSENT, "kernels: Transformer Engine 2.20.2: linear layers, norms"),
        (True, BROKEN, ABSENT, f"kernels: torch; Transformer Engine is not used: 2.20.2: {BROKEN.detail}"),
        (True, ABSENT, APEX, "kernels: torch, and Apex 0.1: Adam; Transformer Engine is not used: not installed"),
    ],
)
def test_a_run_says_whose_kernels_it_has_and_why_not_transformer_engines(
    demo, monkeypatch, capsys, cuda, engine, apex, line
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(accelerations, "transformer_engine", lambda: engine)
    monkeypatch.setattr(accelerations, "apex", lambda: apex)
    assert module.kernels() == line
    monkeypatch.setattr(topology, "join", lambda rank, size: None)
    monkeypatch.setattr(training_rank, "_hold_directories", _stop_here)
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(StopIteration):
            training_rank.training_work(demo)(lambda: False)
    assert capsys.readouterr().err == (f"{line}\n" if line else "")


def _stop_here(run):
    raise StopIteration


def test_a_rank_in_fp8_tells_of_the_driver_before_it_misses_a_gpu(demo, monkeypatch):
    """Under torchrun and in a job nothing has looked at the machine before."""
    chosen = FP8Config(recipe="tensorwise")
    run = dataclasses.replace(demo, training=dataclasses.replace(demo.training, precision="bf16", fp8=chosen))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(topology, "join", _stop_here)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ResourceError, match="^training.fp8 .recipe tensorwise. needs a GPU with FP8, and none can be"):
        training_rank.training_work(run)(lambda: False)
    monkeypatch.setattr(recipes, "driver_fault", lambda: "torch cannot use the GPUs: the driver is too old")
    with pytest.raises(ResourceError, match="^torch cannot use the GPUs: the driver is too old$"):
        training_rank.training_work(run)(lambda: False)
