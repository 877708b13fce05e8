"""The status of a job, from SLURM's queue, the events that its nodes noted, and the newest metrics of its run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llada_megatron.launch.cluster.job import Verdict
from llada_megatron.launch.cluster.registry import SubmittedJob
from llada_megatron.launch.cluster.slurm import QueuedJob
from llada_megatron.parallel.training.metrics_file import last_metrics

FINAL = ("done", "stopped", "failed")
"""The status of a verdict after which a job is not queued again."""


@dataclass(frozen=True)
class JobStatus:
    """One line of `llada jobs`."""

    job_id: int
    run: str
    output_dir: str
    directory: str
    state: str
    """In lower case a state of this program (done, stopped, failed, ended, unknown), in capitals one of SLURM."""
    live: bool
    note: str
    """Why the job waits, has ended or has been started again; may be empty."""
    step: int
    steps: int
    loss: float | None
    tokens_per_second: float | None
    seconds_left: float | None
    """Seconds of training that are left at the newest speed, without time in the queue."""
    requeues: int
    restarts: int
    """How often the ranks have been started again inside an allocation."""
    nodes: str


def status(job: SubmittedJob, queued: QueuedJob | None, slurm: bool, newest: bool = True) -> JobStatus:
    """The status of `job`.

    Args:
        queued: what SLURM knows of it; None where it knows nothing, or has forgotten it.
        slurm: whether SLURM could be asked.
        newest: whether it is the newest job of its run; the run's metrics are not those of an older one.
    """
    record, events = job.record, job.directory.events()
    attempt = job.directory.newest_attempt()
    verdict = job.directory.read_verdict(attempt)
    final = verdict is not None and verdict.status in FINAL  # even while SLURM is still completing the job
    live = queued is not None and queued.is_live and not final
    newest_events = [line for line in events if line["attempt"] == attempt]
    if queued is not None and live:
        state, note = _live(queued, verdict, newest_events, job)
    else:
        state, note = _over(queued, verdict, newest_events, slurm, job)
    loss = last_metrics(record.output_dir, "loss") if newest else {}
    speed = last_metrics(record.output_dir, "seconds_per_step") if newest else {}
    step = loss.get("step", 0)
    remaining = max(0, record.steps - step)
    running = live and queued is not None and queued.state == "RUNNING"
    return JobStatus(
        job_id=record.job_id,
        run=record.name,
        output_dir=record.output_dir,
        directory=str(job.directory.path),
        state=state,
        live=live,
        note=note,
        step=step,
        steps=record.steps,
        loss=loss.get("loss"),
        tokens_per_second=speed.get("tokens_per_second") if running else None,
        seconds_left=remaining * speed["seconds_per_step"] if live and "seconds_per_step" in speed else None,
        requeues=attempt + (state == "PENDING" and verdict is not None),
        restarts=sum(line["event"] == "restart" for line in events),
        nodes=queued.nodes if queued and queued.nodes else str(record.nodes),
    )


def statuses(jobs: list[SubmittedJob], queue: Mapping[int, QueuedJob] | None) -> list[JobStatus]:
    """The status of each of `jobs`, which are the oldest first; `queue` is None where SLURM could not be asked."""
    newest = {job.record.output_dir: job.directory.path for job in jobs}
    known = queue or {}
    found = []
    for job in jobs:
        is_newest = newest[job.record.output_dir] == job.directory.path
        found.append(status(job, known.get(job.record.job_id), queue is not None, is_newest))
    return found


def _live(
    queued: QueuedJob, verdict: Verdict | None, events: list[dict[str, Any]], job: SubmittedJob
) -> tuple[str, str]:
    """State and note of a job that runs or may run again; `verdict` and `events` are those of its newest attempt."""
    if job.directory.stop.exists():
        return queued.state, "saving and ending on request"
    waiting = "" if queued.reason in ("None", "") else queued.reason
    if queued.state == "PENDING":
        again = f"queued again: {verdict.reason}" if verdict is not None else ""
        return queued.state, "; ".join(filter(None, (waiting, again)))
    if queued.state != "RUNNING":
        return queued.state, verdict.reason if verdict is not None else waiting
    starts = [line for line in events if line["event"] == "start"]
    if not starts:
        return queued.state, "checking the nodes"
    nodes = len(starts[-1].get("nodes", ()))
    fewer = f"on {nodes} of {job.record.nodes} nodes" if 0 < nodes < job.record.nodes else ""
    restarts = [line for line in events if line["event"] == "restart"]
    again = f"ranks started again: {restarts[-1].get('reason', '')}" if restarts else ""
    return queued.state, "; ".join(filter(None, (fewer, again)))


def _over(
    queued: QueuedJob | None, verdict: Verdict | None, events: list[dict[str, Any]], slurm: bool, job: SubmittedJob
) -> tuple[str, str]:
    """State and note of a job that SLURM does not run any more, or where SLURM cannot be asked."""
    if verdict is not None and verdict.status in FINAL:
        return verdict.status, verdict.reason
    reason = verdict.reason if verdict is not None else ""
    if job.directory.stop.exists() and slurm:
        ran = any(line["event"] == "start" for line in events)
        silent = "killed before it had saved" if ran else "ended on request before its ranks ran"
        return "stopped", reason or silent
    if queued is not None:
        return queued.state, reason or ("" if queued.reason in ("None", "") else queued.reason)
    if not slurm:
        return "unknown", "; ".join(filter(None, ("SLURM cannot be asked here", reason)))
    return "ended", reason or "it left no verdict; its output may say why"
