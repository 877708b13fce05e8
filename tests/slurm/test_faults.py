"""One fault after the other into one run, over three jobs: it goes on from the newest whole checkpoint each time.

A fault costs a start of all ranks on two nodes; hence one run goes through all of them and is compared once.
"""

import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import fault_run, observation
from benchmarks.small_run import INTERVAL, Submitted, Workplace
from tests.slurm.checks import assert_same_to_the_last_bit, end_of, output_of, status_of


@dataclass
class Disturbed:
    """The run that all of it happens to."""

    place: Workplace
    job: Submitted | None = None
    """The job that it is at present; None before the first."""
    before: dict[str, Any] = field(default_factory=dict)
    """What `llada jobs` said of it after the fault before. Asked anew, it would cost steps, of which there are 40."""

    def submit(self, *overrides: str, cluster: str = "cluster.yaml") -> None:
        self.job = self.place.submit("output_dir=disturbed", *overrides, cluster=cluster)
        self.status()

    def status(self) -> dict[str, Any]:
        self.before = status_of(self.place, self.job)
        return self.before

    def step(self) -> int:
        return observation.last_step(self.job.output_dir)


@pytest.fixture(scope="module")
def disturbed(place) -> Disturbed:
    return Disturbed(place)


@pytest.fixture
def run(disturbed) -> Disturbed:
    """With a job, also where a test is run by itself."""
    if disturbed.job is None:
        disturbed.submit()
    return disturbed


def test_time_limit_saves_and_queues_the_job_again(slurm, place, disturbed):
    """SLURM's own signal: the end is moved near, and the ranks are held until it comes, lest the run end before."""
    unwatched = ("recovery.hang_minimum_s=600", "recovery.hang_other_s=600")
    disturbed.submit(*unwatched, cluster=place.cluster("limited.yaml", signal_before_end_s=45))
    job = disturbed.job
    observation.wait_for_step(job.output_dir, INTERVAL + 2)
    ranks, offset = observation.ranks(slurm), observation.output_size(job.directory)
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    step, since = disturbed.step(), time.time()
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since + 50))
    slurm.run("scontrol", "update", f"jobid={job.id}", f"EndTime={end}")  # SLURM looks every 30 s
    observation.wait_until(lambda: any(map(_is_asked, ranks)), "the signal before the end", 90)
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
    attempt = job.directory / "attempt"  # the queue may hold it for less than a look at it takes
    observation.wait_until(
        lambda: slurm.state(job.id) == "PENDING" or attempt.read_text() == "1\n", "the job in the queue again"
    )
    slurm.run("scontrol", "update", f"jobid={job.id}", "TimeLimit=60")
    assert observation.newest_whole(job.output_dir) in (step, step + 1), "it saved the step that it was in"
    assert fault_run.wait_for_start(slurm, job, since, offset) >= step
    after = disturbed.status()
    assert (after["requeues"], after["restarts"]) == (1, 0)
    assert "saved after step" in output_of(job)[offset:]


def test_stopped_job_is_submitted_again(slurm, place, run):
    step = observation.wait_for_step(run.job.output_dir, run.step() + 1)
    place.must("stop", str(run.job.id))
    assert end_of(slurm, run.job) == "COMPLETED", output_of(run.job)
    stopped = run.status()
    assert stopped["state"] == "stopped"
    assert observation.newest_whole(run.job.output_dir) == stopped["step"] >= step
    run.submit()


def requeue(slurm, job):
    slurm.run("scontrol", "requeue", str(job.id))


def kill_first_agent(slurm, job):
    slurm.processes(observation.AGENT, slurm.nodes[0])[0].kill()


def kill_second_agent(slurm, job):
    slurm.processes(observation.AGENT, slurm.nodes[1])[0].kill()


def kill_rank(slurm, job):
    observation.ranks(slurm, slurm.nodes[1])[0].kill()


def stop_rank(slurm, job):
    """A rank that hangs: the others wait for it in a collective."""
    observation.ranks(slurm, slurm.nodes[0])[0].send_signal(signal.SIGSTOP)


@pytest.mark.parametrize(
    ("fault", "queued_again", "said"),
    [
        (kill_rank, False, "was killed by SIGKILL"),
        (stop_rank, False, "stopped"),
        (kill_second_agent, None, "no longer answers"),
        (requeue, True, ""),
        (kill_first_agent, True, ""),
    ],
)
def test_training_goes_on_after(fault, queued_again, said, slurm, run):
    job = run.job
    fault_run.wait_alive(slurm, job, max(INTERVAL, run.step()) + 2)  # it is training
    before, since, offset = run.before, time.time(), observation.output_size(job.directory)
    fault(slurm, job)
    whole = observation.newest_whole(job.output_dir)
    assert whole > 0
    assert fault_run.wait_for_start(slurm, job, since, offset) >= whole
    after = run.status()
    assert after["state"] == "RUNNING"
    if queued_again is not None:
        assert (after["requeues"] > before["requeues"]) == queued_again
        assert (after["restarts"] > before["restarts"]) != queued_again
    assert said in output_of(job)[offset:]


def test_cancelled_job_is_submitted_again_and_ends_as_if_nothing_had_happened(slurm, run, calm):
    observation.wait_for_step(run.job.output_dir, run.step() + 1)
    slurm.run("scancel", str(run.job.id))
    assert end_of(slurm, run.job) == "CANCELLED"
    run.submit()
    assert end_of(slurm, run.job) == "COMPLETED", output_of(run.job)
    assert run.status()["state"] == "done"
    assert_same_to_the_last_bit(calm, run.job)


def _is_asked(rank: psutil.Process) -> bool:
    """Whether SIGUSR1 waits for a process that is stopped."""
    lines = Path(f"/proc/{rank.pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (signal.SIGUSR1 - 1) & 1 for mask in masks)
