"""The plan of faults, the NaN brought in from outside, and what is said where SLURM is missing."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from benchmarks import faults, nan_hook, private_slurm
from llada_megatron.llada_moe.errors import ResourceError


def test_a_plan_has_every_kind_in_turn_and_room_between_faults():
    plan = faults.draw(seed=3, count=21, spacing=8)
    assert set(Counter(fault.kind for fault in plan).values()) == {3}
    assert [fault.step // 8 for fault in plan] == list(range(1, 22))
    assert faults.draw(3, 21, 8) == plan
    assert faults.draw(4, 21, 8) != plan


TRAINER = """
TrainingStep = type("TrainingStep", (), {"gradients": lambda self, step: step})
"""
PROGRAM = """
import torch
from types import SimpleNamespace
from llada_megatron.parallel.training.step import TrainingStep

grad = torch.ones(8)
group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
buffer = SimpleNamespace(data_parallel_group=group, buckets=[SimpleNamespace(grad_data=grad)])
step = TrainingStep.__new__(TrainingStep)
step.models = [SimpleNamespace(buffers=[buffer], expert_parallel_buffers=[])]
print(TrainingStep.gradients(step, 7), grad.isnan().tolist())
print(TrainingStep.gradients(step, 8), grad.isnan().sum().item())
"""


def test_one_nan_reaches_the_shard_of_one_rank_once(tmp_path):
    """In a package of the same name whose trainer does nothing, so that no ranks are needed."""
    fake = tmp_path / "fake" / "llada_megatron"
    (fake / "parallel" / "training").mkdir(parents=True)
    real = os.path.dirname(sys.modules["llada_megatron"].__file__)
    (fake / "__init__.py").write_text(f"__path__.append({real!r})\n")
    (fake / "parallel" / "__init__.py").write_text("")
    (fake / "parallel" / "training" / "__init__.py").write_text("")
    (fake / "parallel" / "training" / "step.py").write_text(TRAINER)
    hook = nan_hook.prepare(tmp_path / "hook")
    nan_hook.request_path(hook).touch()
    path = os.pathsep.join([str(hook), str(tmp_path / "fake")])
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == f"7 {[False] * 4 + [True] + [False] * 3}"
    assert second == "8 1", "the NaN of before, and no other"
    assert not nan_hook.request_path(hook).exists()


def test_missing_programs_are_named_with_the_way_to_get_them(monkeypatch):
    monkeypatch.setattr(private_slurm, "PROGRAMS", ("sbatch-that-is-not-there",))
    with pytest.raises(ResourceError, match=r"sbatch-that-is-not-there.*apt-get install"):
        private_slurm.PrivateSlurm().__enter__()
