"""`llada jobs`: the submitted jobs and their status."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from llada_megatron.console import emit_json, message
from llada_megatron.llada_moe.errors import ResourceError

if TYPE_CHECKING:
    from llada_megatron.launch.cluster.registry import SubmittedJob
    from llada_megatron.launch.cluster.slurm import QueuedJob
    from llada_megatron.launch.cluster.status import JobStatus

EXAMPLES = """\
examples:
  llada jobs                     the newest job of each run, of the last week
  llada jobs 4711                one job
  llada jobs runs/llada-8b       the jobs of a run, also those of another user

A state in capitals is SLURM's; done, stopped and failed are the job's own verdict at its end. RESTARTS: how often the
job was queued again + how often its ranks were started again inside an allocation."""
_RECENT_S = 7 * 86400
_HEADINGS = ("JOB", "RUN", "STATE", "STEP", "LOSS", "TOKENS/S", "LEFT", "RESTARTS", "NODES")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `llada jobs`."""
    parser.add_argument(
        "jobs", metavar="JOB_ID|RUN_DIR", nargs="*", help="which jobs (default: those of the last week)"
    )
    parser.add_argument("--all", action="store_true", help="also older jobs, and earlier ones of the same run")


def run(args: argparse.Namespace) -> int:
    """Show the jobs; returns the exit code."""
    from llada_megatron.launch.cluster.status import statuses

    jobs = _chosen(args)
    queue = ask_slurm(jobs)
    if not args.jobs and not args.all:  # a job may run for weeks without an event
        jobs = [job for job in jobs if job.record.job_id in (queue or {}) or time.time() - _touched(job) < _RECENT_S]
    found = statuses(jobs, queue)
    if not args.jobs and not args.all:
        newest = {each.output_dir: each for each in found}
        found = [each for each in found if each.live or each is newest[each.output_dir]]
    if args.json:
        emit_json({"jobs": [asdict(each) for each in found]})
    elif found:
        print("\n".join(table(found)))
    else:
        message("no jobs; `llada submit` makes one, `llada jobs --all` shows older ones")
    return 0


def ask_slurm(jobs: list[SubmittedJob]) -> dict[int, QueuedJob] | None:
    """What SLURM knows of these jobs, by id; None, after a message, where it cannot be asked."""
    from llada_megatron.launch.cluster import slurm

    try:
        return slurm.queue([job.record.job_id for job in jobs])
    except ResourceError as error:
        message(f"warning: {error}; showing what the jobs have noted themselves")
        return None


def table(found: list[JobStatus]) -> list[str]:
    """The table for people: a row per job, and below it the note, where there is one."""
    rows = [_row(each) for each in found]
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
    lines = [_line(_HEADINGS, widths)]
    for each, row in zip(found, rows, strict=True):
        lines.append(_line(row, widths))
        if each.note:
            lines.append(f"  {each.note}")
    return lines


def duration(seconds: float) -> str:
    """A number of seconds as text for people: `3d 4h`, `4h 20m`, `2m 10s`."""
    whole = round(seconds)
    for size, unit, below, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit} {whole % size // below}{name}"
    return f"{whole}s"


def _chosen(args: argparse.Namespace) -> list[SubmittedJob]:
    from llada_megatron.launch.cluster import registry

    if args.jobs:
        return [job for name in args.jobs for job in registry.find(name)]
    return registry.jobs_of_user()


def _touched(job: SubmittedJob) -> float:
    """When the job's directory last changed (seconds since 1970)."""
    return max(path.stat().st_mtime for path in (job.directory.path, *job.directory.path.glob("events")))


def _row(each: JobStatus) -> tuple[str, ...]:
    return (
        str(each.job_id),
        each.run,
        each.state,
        f"{each.step}/{each.steps}",
        "-" if each.loss is None else f"{each.loss:.4f}",
        "-" if each.tokens_per_second is None else f"{each.tokens_per_second:,.0f}",
        "-" if each.seconds_left is None else duration(each.seconds_left),
        f"{each.requeues}+{each.restarts}",
        each.nodes,
    )


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
