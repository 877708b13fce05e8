"""One fault after the other in one job: each is followed by training from the newest whole checkpoint."""

import signal
import time

import pytest

from benchmarks import fault_run, observation
from benchmarks.small_run import INTERVAL
from tests.slurm.checks import assert_same_to_the_last_bit, end_of, output_of, status_of


def requeue(slurm, job):
    slurm.run("scontrol", "requeue", str(job.id))


def signal_before_the_end(slurm, job):
    """As `--signal=B:USR1@N` sends it: to the batch script alone."""
    slurm.run("scancel", "--batch", "--signal=USR1", str(job.id))


def kill_first_agent(slurm, job):
    slurm.processes(observation.AGENT, slurm.nodes[0])[0].kill()


def kill_second_agent(slurm, job):
    slurm.processes(observation.AGENT, slurm.nodes[1])[0].kill()


def kill_rank(slurm, job):
    observation.ranks(slurm, slurm.nodes[1])[0].kill()


def stop_rank(slurm, job):
    """A rank that hangs: the others wait for it in a collective."""
    observation.ranks(slurm, slurm.nodes[0])[0].send_signal(signal.SIGSTOP)


@pytest.fixture(scope="module")
def job(place):
    return place.submit("output_dir=disturbed")


@pytest.mark.parametrize(
    ("fault", "queued_again", "said"),
    [
        (kill_rank, False, "was killed by SIGKILL"),
        (signal_before_the_end, True, "saved after step"),
        (stop_rank, False, "stopped"),
        (kill_second_agent, None, "no longer answers"),
        (requeue, True, ""),
        (kill_first_agent, True, ""),
    ],
)
def test_training_goes_on_after(fault, queued_again, said, slurm, place, job):
    fault_run.wait_alive(slurm, job, max(INTERVAL, observation.last_step(job.output_dir)) + 2)  # it is training
    before, since, offset = status_of(place, job), time.time(), observation.output_size(job.directory)
    fault(slurm, job)
    whole = observation.newest_whole(job.output_dir)
    assert whole > 0
    assert fault_run.wait_for_start(slurm, job, since, offset) >= whole
    after = status_of(place, job)
    assert after["state"] == "RUNNING"
    if queued_again is not None:
        assert (after["requeues"] > before["requeues"]) == queued_again
        assert (after["restarts"] > before["restarts"]) != queued_again
    assert said in output_of(job)[offset:]


def test_it_ends_as_if_nothing_had_happened(slurm, place, job, calm):
    assert end_of(slurm, job) == "COMPLETED", output_of(job)
    assert status_of(place, job)["state"] == "done"
    assert_same_to_the_last_bit(calm, job)
