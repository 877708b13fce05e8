"""`llada stop`: a job saves and ends, and is not queued again."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from llada_megatron.console import emit_json, message
from llada_megatron.llada_moe.errors import ResourceError

if TYPE_CHECKING:
    from llada_megatron.launch.cluster.registry import SubmittedJob
    from llada_megatron.launch.cluster.status import JobStatus

EXAMPLES = """\
examples:
  llada stop 4711
  llada stop runs/llada-8b --no-wait

The job finishes its step, saves and ends; a job that still waits in the queue is removed from it. Submit the same run
again to go on from there. (`scancel` ends a job too, but saves only where that takes less than SLURM's KillWait.)"""
_POLL_S = 1.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `llada stop`."""
    parser.add_argument("job", metavar="JOB_ID|RUN_DIR", help="which job (of a run: the newest)")
    parser.add_argument("--no-wait", action="store_true", help="do not wait for the end of the job")


def run(args: argparse.Namespace) -> int:
    """Stop the job; returns the exit code (1: the job ended in another way, for example by a failure meanwhile)."""
    from llada_megatron.launch.cluster import registry

    job = registry.find(args.job)[-1]
    if _ask(job) and not args.no_wait:
        _wait(job)
    return _tell(_status(job), args)


def _ask(job: SubmittedJob) -> bool:
    """Ask the job to save and end; returns False when it is already over."""
    from llada_megatron.launch.cluster import slurm

    number = job.record.job_id
    found = slurm.queue([number]).get(number)
    if found is None or not found.is_live:
        message(f"job {number} is already over")
        return False
    job.directory.stop.touch()  # before the signal: with this file the job is not queued again
    if found.state == "PENDING":
        slurm.take_out_of_queue(number)
        message(f"job {number} was waiting in the queue and is removed from it")
        return True
    try:
        slurm.ask_to_save(number)
    except ResourceError:  # suspended, or its script is ending; the file stops it when it runs again
        message(f"job {number} is {found.state} and takes no signal now; if it runs again, it will save and end")
    else:
        message(f"job {number} is asked to finish its step, save and end")
    return True


def _wait(job: SubmittedJob) -> None:
    """Wait until the job is over; one that has just been queued again is removed from the queue."""
    from llada_megatron.launch.cluster import slurm

    number = job.record.job_id
    while (found := slurm.queue([number]).get(number)) is not None and found.is_live:
        if found.state == "PENDING":
            slurm.take_out_of_queue(number)
        time.sleep(_POLL_S)


def _status(job: SubmittedJob) -> JobStatus:
    from llada_megatron.launch.cluster import slurm
    from llada_megatron.launch.cluster.status import status

    number = job.record.job_id
    return status(job, slurm.queue([number]).get(number), slurm=True)


def _tell(found: JobStatus, args: argparse.Namespace) -> int:
    if args.json:
        emit_json({"job_id": found.job_id, "state": found.state, "step": found.step, "note": found.note})
    else:
        print(
            f"job {found.job_id}: {found.state}, step {found.step}/{found.steps}"
            + (f"; {found.note}" * bool(found.note))
        )
    return 0 if found.live or found.state in ("done", "stopped") else 1
