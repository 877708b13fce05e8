"""Jobs that end early and are taken up again: at a time limit by themselves, after `scancel` and `llada stop` by us."""

import signal
import time
from pathlib import Path

import psutil

from benchmarks import fault_run, observation
from tests.slurm.checks import assert_same_to_the_last_bit, end_of, output_of, status_of


def test_time_limit_saves_and_queues_the_job_again(slurm, place, calm):
    """SLURM's own signal: the end is moved near, and the ranks are held until it comes, lest the run end before."""
    cluster = place.cluster("limited.yaml", signal_before_end_s=45)
    unwatched = ("recovery.hang_minimum_s=600", "recovery.hang_other_s=600")
    job = place.submit("output_dir=limited", *unwatched, cluster=cluster)
    observation.wait_for_step(job.output_dir, 7)
    ranks = observation.ranks(slurm)
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    step, since = observation.last_step(job.output_dir), time.time()
    end = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since + 50))
    slurm.run("scontrol", "update", f"jobid={job.id}", f"EndTime={end}")  # SLURM looks every 30 s
    observation.wait_until(lambda: any(map(_is_asked, ranks)), "the signal before the end", 90)
    for rank in ranks:
        rank.send_signal(signal.SIGCONT)
    observation.wait_until(lambda: slurm.state(job.id) == "PENDING", "the job in the queue again")
    slurm.run("scontrol", "update", f"jobid={job.id}", "TimeLimit=60")
    assert observation.newest_whole(job.output_dir) in (step, step + 1), "it saved the step that it was in"
    assert fault_run.wait_for_start(slurm, job, since, 0) >= step
    assert end_of(slurm, job) == "COMPLETED", output_of(job)
    assert status_of(place, job)["requeues"] == 1
    assert_same_to_the_last_bit(calm, job)


def test_cancelled_and_stopped_jobs_are_submitted_again(slurm, place, calm):
    first = place.submit("output_dir=again")
    observation.wait_for_step(first.output_dir, 7)
    slurm.run("scancel", str(first.id))
    assert end_of(slurm, first) == "CANCELLED"

    second = place.submit("output_dir=again")
    step = observation.wait_for_step(second.output_dir, 14)
    place.must("stop", str(second.id))
    assert end_of(slurm, second) == "COMPLETED", output_of(second)
    stopped = status_of(place, second)
    assert stopped["state"] == "stopped"
    assert observation.newest_whole(second.output_dir) == stopped["step"] >= step

    third = place.submit("output_dir=again")
    assert end_of(slurm, third) == "COMPLETED", output_of(third)
    assert_same_to_the_last_bit(calm, third)


def _is_asked(rank: psutil.Process) -> bool:
    """Whether SIGUSR1 waits for a process that is stopped."""
    lines = Path(f"/proc/{rank.pid}/status").read_text().splitlines()
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (signal.SIGUSR1 - 1) & 1 for mask in masks)
