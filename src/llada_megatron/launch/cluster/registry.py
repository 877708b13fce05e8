"""Records of submitted jobs: in their own directories, and in a list of this user's jobs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from llada_megatron.launch import files
from llada_megatron.launch.cluster.job import JobDirectory
from llada_megatron.llada_moe.errors import ConfigError, ResourceError

JOBS = "jobs"
"""Folder of a run's output directory with one directory per submitted job."""


@dataclass(frozen=True)
class JobRecord:
    """What `llada submit` knew of a job: job.json in its directory."""

    job_id: int
    name: str
    submitted: float
    """Seconds since 1970."""
    output_dir: str
    """An absolute path."""
    nodes: int
    ranks: int
    steps: int
    cluster: str
    """The cluster file as it was named on the command line."""


@dataclass(frozen=True)
class SubmittedJob:
    """A job and its directory."""

    directory: JobDirectory
    record: JobRecord


def new_directory(output_dir: Path) -> JobDirectory:
    """A directory for a new job, named after the time; it is not created yet."""
    name = time.strftime("%Y%m%d-%H%M%S")
    folder = output_dir.absolute() / JOBS
    candidates = (folder / (name if number == 1 else f"{name}-{number}") for number in range(1, 1000))
    return JobDirectory(next(path for path in candidates if not path.exists()))


@contextlib.contextmanager
def exclusive_submission(output_dir: Path) -> Iterator[None]:
    """While this is open, no other `llada submit` can check or add jobs of the same run.

    Raises:
        ResourceError: another one is doing so.
    """
    folder = output_dir / JOBS
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".submitting").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ResourceError(
                f"another `llada submit` is submitting {output_dir} at this moment; two jobs must not write to one run"
            ) from None
        except OSError:  # a file system without locks: the run lock still keeps a second job from training
            pass
        yield


def write(job: JobDirectory, record: JobRecord) -> None:
    """Record a submitted job in its directory and in the list of this user's jobs."""
    files.replace(_record_path(job.path), json.dumps(asdict(record)) + "\n")
    registry = _registry()
    registry.parent.mkdir(parents=True, exist_ok=True)
    with registry.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"directory": str(job.path), "job_id": record.job_id}) + "\n")


def jobs_of_run(output_dir: Path) -> list[SubmittedJob]:
    """The jobs of a run, oldest first."""
    found = filter(None, map(_read, (output_dir.absolute() / JOBS).glob("*/")))
    return sorted(found, key=lambda job: job.record.submitted)


def jobs_of_user() -> list[SubmittedJob]:
    """All jobs that this user submitted and whose directories are still there, oldest first."""
    return list(filter(None, (_read(path) for path, _ in _registered())))


def find(name: str) -> list[SubmittedJob]:
    """The jobs that a SLURM id, the output directory of a run, or the directory of a job stands for.

    An id stands for one job, and so does a job's directory; a run may have several, the oldest first.

    Raises:
        ConfigError: there is no such job.
    """
    if name.isdecimal():
        job = job_by_id(int(name))
        if job is None:
            raise ConfigError(
                f"no job {name} among those that you submitted with `llada submit` (`llada jobs --all` lists them); "
                "name a job of another user or machine by the output directory of its run"
            )
        return [job]
    single = _read(Path(name).absolute())
    jobs = [single] if single is not None else jobs_of_run(Path(name))
    if not jobs:
        raise ConfigError(f"{name}: neither the id of a job nor the output directory of a run that was submitted")
    return jobs


def job_by_id(job_id: int) -> SubmittedJob | None:
    """The newest job of this user with a SLURM id (another cluster may have given the same one before)."""
    found = [job for job in (_read(path) for path, number in _registered() if number == job_id) if job is not None]
    return found[-1] if found else None


def _registered() -> Iterator[tuple[Path, int]]:
    try:
        lines = _registry().read_text("utf-8").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            entry = json.loads(line)
            yield Path(entry["directory"]), entry["job_id"]
        except (ValueError, KeyError, TypeError):  # cut short by a full disk
            continue


def _registry() -> Path:
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "llada" / "jobs.jsonl"


def _record_path(directory: Path) -> Path:
    return directory / "job.json"


def _read(directory: Path) -> SubmittedJob | None:
    try:
        values = json.loads(_record_path(directory).read_text("utf-8"))
        return SubmittedJob(JobDirectory(directory), JobRecord(**values))
    except (OSError, ValueError, TypeError):
        return None
