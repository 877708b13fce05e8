"""`llada train` refuses what cannot work before it starts a process: one message, an exit code, no stack trace."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llada_megatron.launch.run_lock import RunLock

ROOT = Path(__file__).resolve().parents[2]
DEMO = str(ROOT / "configs/runs/demo.yaml")


def _train(*arguments, cwd, **variables):
    command = [sys.executable, "-m", "llada_megatron.cli", "train", DEMO, *arguments]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=120, env=os.environ | variables | {"NO_COLOR": "1"}
    )


@pytest.fixture
def prepared(tmp_path):
    """A prepared set by its files' names only: enough for the checks before the start."""
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"corpus{suffix}").touch()
    return f"data.sets.0.path={tmp_path}/corpus"


def _assert_refused(done, code, *texts):
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    for text in texts:
        assert text in done.stderr


def test_an_unknown_key(tmp_path):
    _assert_refused(_train("trainin.steps=2", cwd=tmp_path), 2, "trainin", "did you mean 'training'?")


def test_tensor_parallelism_that_does_not_divide_the_heads(tmp_path):
    done = _train("layout.tensor_parallel=3", "layout.sequence_parallel=true", cwd=tmp_path)
    _assert_refused(done, 2, "3 does not divide num_attention_heads 4")


def test_data_that_is_not_there(tmp_path):
    done = _train("data.sets.0.path=nowhere", cwd=tmp_path)
    _assert_refused(done, 1, "no prepared data at nowhere", "llada prepare TEXT --output nowhere")
    assert not (tmp_path / "runs").exists()


def test_more_ranks_than_this_machine_can_give(tmp_path, prepared):
    sizes = ["layout.data_parallel=1024", "training.global_batch_size=1024", "training.micro_batch_size=1"]
    _assert_refused(_train(prepared, *sizes, cwd=tmp_path), 1, "the layout has 1024 ranks")
    assert not (tmp_path / "runs").exists()


def test_more_memory_than_this_machine_has(tmp_path, prepared):
    sizes = ["model=llada2-flash", "layout.data_parallel=1", "layout.expert_parallel=1", "training.precision=bf16"]
    done = _train(prepared, *sizes, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    _assert_refused(done, 1, "1 rank needs at least", "GB of memory")


def test_a_job_of_another_size(tmp_path, prepared):
    job = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "x"}
    done = _train(prepared, cwd=tmp_path, RANK="0", **job)
    _assert_refused(done, 2, "data 2 = 2 ranks, but torchrun started 3")
    other = _train(prepared, cwd=tmp_path, RANK="1", **job)
    assert (other.returncode, other.stderr) == (2, "")


def test_weights_to_start_from_that_are_not_there(tmp_path, prepared):
    done = _train(prepared, "checkpoint.load=elsewhere", "output_dir=new", cwd=tmp_path)
    _assert_refused(done, 1, "no checkpoint in elsewhere")


def test_a_directory_that_another_process_trains_in(tmp_path, prepared):
    with RunLock.take(tmp_path / "busy", "17"):
        done = _train(prepared, f"output_dir={tmp_path}/busy", cwd=tmp_path)
        _assert_refused(done, 1, f"busy is being trained by job 17, process {os.getpid()} on host")
