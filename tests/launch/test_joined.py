"""Ranks that torchrun or SLURM started: they find each other, rank 0 prints, a failing rank is named."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

STUB = Path(__file__).with_name("stub_joined.py")


def _torchrun(behaviour, directory):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run([*command, str(STUB), behaviour, str(directory)], capture_output=True, text=True, timeout=120)


def _as_slurm_tasks(behaviour, directory):
    """Two processes with the variables that srun sets, and the head node given (names may not resolve)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"SLURM_JOB_ID": "1", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "here"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    tasks = [
        subprocess.Popen(
            [sys.executable, str(STUB), behaviour, str(directory)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in range(2)
    ]
    return [(*task.communicate(timeout=120), task.returncode) for task in tasks]


def test_torchrun(tmp_path):
    done = _torchrun("ok", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torchrun {'sum': 2.0} False\n"
    assert "progress of rank 0" in done.stderr
    assert "progress of rank 1" not in done.stderr
    assert "noise" in (tmp_path / "logs/rank-1.log").read_text()


def test_torchrun_failure(tmp_path):
    done = _torchrun("fail", tmp_path)
    assert done.returncode != 0
    line = "error: rank 1 (dp 1, pp 0, tp 0, cp 0, ep 0): ValueError: the reason; full stack: "
    assert f"{line}{tmp_path}/logs/rank-1.log" in done.stderr


@pytest.mark.parametrize("behaviour", ["ok", "fail"])
def test_slurm_tasks(tmp_path, behaviour):
    (out, _, code), (other_out, other_err, other_code) = _as_slurm_tasks(behaviour, tmp_path)
    assert other_out == ""
    if behaviour == "ok":
        assert (out, code, other_err, other_code) == ("srun {'sum': 2.0} False\n", 0, "", 0)
    else:
        assert (code, other_code) == (1, 1)
        assert other_err.startswith("error: rank 1 (dp 1, pp 0, tp 0, cp 0, ep 0): ValueError: the reason")
        assert len(other_err.splitlines()) == 1
