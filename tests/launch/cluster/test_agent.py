"""Two agents without SLURM: whatever is done to them, the run ends as the undisturbed one, or says why not."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.launch.cluster.agents import STEPS, Job, prepare
from tests.ranks import run_ranks

pytestmark = pytest.mark.timeout(900)
HANGS_SOON = ("recovery.hang_minimum_s=5", "recovery.hang_factor=3", "recovery.hang_other_s=120")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("agents")
    prepare(folder)
    return folder


@pytest.fixture
def make(folder) -> Iterator[type[Job]]:
    made = []

    def job(*arguments: str, **options: str) -> Job:
        made.append(Job(folder, *arguments, **options))
        return made[-1]

    yield job
    for each in made:
        each.kill()


@pytest.fixture(scope="module")
def undisturbed(folder) -> Job:
    job = Job(folder, "undisturbed")
    job.start()
    verdict = job.ended()
    job.kill()
    assert verdict is not None and verdict.status == "done", job.said()
    return job


def tensors_of(checkpoint: str) -> dict[str, torch.Tensor]:
    from megatron.core import dist_checkpointing

    return {k: v for k, v in dist_checkpointing.load_plain_tensors(checkpoint).items() if isinstance(v, torch.Tensor)}


def weights(job: Job) -> dict[str, torch.Tensor]:
    return run_ranks(tensors_of, 1, str(job.output / "checkpoints" / f"step-{STEPS:08d}"))[0]


def test_killed_and_hung_ranks_leave_no_trace_in_the_result(make, undisturbed):
    job = make("disturbed", *HANGS_SOON)
    job.start()
    job.until(lambda: job.step() >= 2)
    job.processes[0].kill()  # the first node's agent: it serves the store, so the other one ends by itself
    began = time.monotonic()
    assert job.ended() is None
    assert time.monotonic() - began < 60
    job.start()
    job.until(lambda: job.step() >= 5)
    job.rank(1).kill()
    job.until(lambda: len(job.events("start")) == 3)
    job.until(lambda: job.step() >= 9)
    job.hang(1)
    verdict = job.ended()
    assert verdict is not None and verdict.status == "done", job.said()
    reasons = [event["reason"] for event in job.events("restart")]
    assert any("rank 1 on n1 was killed by SIGKILL" in reason for reason in reasons), job.said()
    assert any("rank 1 on n1 hangs" in reason and "process is stopped" in reason for reason in reasons), job.said()
    assert "most recent call first" in (job.output / "logs/rank-0.log").read_text()  # the stacks of the other rank
    starts, trained = ([e for e in job.events(name) if e["attempt"] == 1] for name in ("start", "training"))
    assert len(trained) == len(starts) == 3  # the first attempt's agent may have been killed before it noted the step
    assert job.losses() == undisturbed.losses()
    expected, found = weights(undisturbed), weights(job)
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_signals_a_stop_file_and_a_lost_node(make, undisturbed):
    job = make("asked")
    job.start()
    job.until(lambda: job.step() >= 2)
    for _ in range(2):  # SLURM may ask more than once
        for agent in job.processes:
            agent.send_signal(signal.SIGUSR1)
    verdict = job.ended()
    assert verdict is not None and verdict.status == "requeue", job.said()
    saved = job.step()
    job.start()
    job.until(lambda: job.step() > saved)
    job.directory.stop.touch()
    verdict = job.ended()
    assert verdict is not None and verdict.status == "stopped", job.said()
    job.directory.stop.unlink()
    saved = job.step()
    job.start()
    job.until(lambda: job.step() > saved)
    job.processes[-1].kill()
    verdict = job.ended()
    assert time.time() - job.events("end")[-1]["time"] < 10, "nobody waits for the goodbye of a node that is gone"
    assert verdict is not None and verdict.status == "done", job.said()
    assert [event["nodes"] for event in job.events("lost")] == [["n1"]]
    assert job.events("start")[-1]["ranks"] == 1
    assert job.losses() == pytest.approx(undisturbed.losses(), rel=1e-5)


def test_an_error_of_the_users_ends_the_job_at_once(make):
    job = make("wrong", "data.validation_fraction=0.99")
    job.start()
    verdict = job.ended()
    assert verdict is not None and verdict.status == "failed", job.said()
    assert "lower data.validation_fraction" in verdict.reason
    assert len(job.events("start")) == 1
