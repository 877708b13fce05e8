"""Calls of SLURM's programs: submit, query, signal and cancel jobs, with SLURM's messages made readable.

Only text formats that every version has are used (`--json` differs between versions, `sacct` needs a database).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llada_megatron.llada_moe.errors import ConfigError, LladaError, ResourceError

LIMIT_S = 60
"""Seconds for one call of a program of SLURM; without a controller they give up by themselves after about ten."""

_NOT_INHERITED = r"SLURM_(?!CONF$)|SBATCH_|SRUN_|LLADA_(JOB|ATTEMPT|RENDEZVOUS|PARENT|REPORTS|HEARTBEATS)$"

_LIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED")
_LIVE += ("RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
_REMEDIES = (
    ("invalid partition", "partition", "partitions of this cluster: {partitions}"),
    ("invalid account", "account", "`sacctmgr show associations user=$USER` lists yours"),
    ("invalid qos", "qos", "`sacctmgr show qos` lists them"),
    ("reservation", "reservation", "`scontrol show reservation` lists them"),
    ("invalid feature", "constraint", "`sinfo -o '%P %f'` lists the features of the nodes"),
    ("time limit", "time", "`sinfo -o '%P %l'` lists the longest time of each partition"),
    ("time specification", "time", "write days-hours:minutes:seconds"),
    ("gres", "gpus_per_node", "`sinfo -o '%P %G'` lists the GPUs of the nodes"),
    ("invalid generic resource", "gpus_per_node", "`sinfo -o '%P %G'` lists the GPUs of the nodes"),
    ("memory", "memory_per_node", "`sinfo -o '%P %m'` lists the memory of the nodes in MB"),
    ("cpu count", "cpus_per_node", "`sinfo -o '%P %c'` lists the cores of the nodes"),
    ("more processors", "cpus_per_node", "`sinfo -o '%P %c'` lists the cores of the nodes"),
    ("node count", "partition", "`sinfo -o '%P %D'` lists the number of nodes; or make the layout smaller"),
    ("node configuration", "partition", "fewer nodes, GPUs, cores or memory: `sinfo -o '%P %D %G %c %m'` lists them"),
    ("node name", "exclude", "`sinfo -N` lists the nodes"),
)
"""Each row: part of a message in lower case, the key of the cluster file that it is about, and what to do."""


@dataclass(frozen=True)
class QueuedJob:
    """What squeue says of a job."""

    job_id: int
    state: str
    """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, CANCELLED, TIMEOUT, …"""
    reason: str
    """Why it waits, or why it ended; SLURM writes `None` where there is no reason."""
    nodes: str
    """The job's nodes as SLURM writes them: `n[1-4]`."""
    time_left: str
    """How much time of the allocation is left."""

    @property
    def is_live(self) -> bool:
        """Whether it runs or may still run."""
        return self.state in _LIVE


def check_present() -> None:
    """Raise ResourceError where this machine cannot submit jobs."""
    if shutil.which("sbatch") is None:
        raise ResourceError(
            "this machine has no sbatch, SLURM's program that submits jobs; run this on a login node of the cluster "
            "(--dry-run shows the script anywhere)"
        )


def submit(script: Path, cluster_file: str) -> int:
    """Submit a script; returns the id that SLURM gives the job.

    Raises:
        ConfigError: SLURM refuses the job; with SLURM's message, the key of `cluster_file` and what to do.
        ResourceError: SLURM cannot be reached.
    """
    done = _call("sbatch", "--parsable", str(script))
    if done.returncode != 0:
        raise _refusal(done.stderr or done.stdout, cluster_file)
    return int(done.stdout.strip().splitlines()[-1].split(";")[0])  # ID, or ID;CLUSTER


def queue(job_ids: Sequence[int]) -> dict[int, QueuedJob]:
    """What SLURM knows of these jobs, by id. It forgets jobs some time after their end (MinJobAge); these are missing.

    Raises:
        ResourceError: SLURM cannot be reached, or is not on this machine.
    """
    if not job_ids:
        return {}
    names = ",".join(map(str, job_ids))
    done = _call("squeue", "-h", "-a", "-t", "all", "-j", names, "-o", "%A|%T|%r|%N|%L")
    if done.returncode != 0 and "invalid job id" not in done.stderr.lower():
        raise _unreachable(done.stderr)
    return {job.job_id: job for job in map(_queued_job, done.stdout.splitlines()) if job is not None}


def partitions() -> str:
    """One line `NAME|NAME|NODES|TIME LIMIT` per partition; the first name of a default partition ends in `*`.

    Raises:
        ResourceError: SLURM cannot be reached, or is not on this machine.
    """
    done = _call("sinfo", "-h", "-o", "%P|%R|%D|%l")
    if done.returncode != 0:
        raise _unreachable(done.stderr)
    return done.stdout


def take_out_of_queue(job_id: int) -> None:
    """Cancel a job that waits in the queue; a job that has just started is not touched. Raises ResourceError."""
    _checked("scancel", "--state=PENDING", str(job_id))


def ask_to_save(job_id: int) -> None:
    """Send SIGUSR1 to a job's script, which passes it on: finish the step, save and end. Raises ResourceError."""
    _checked("scancel", "--batch", "--signal=USR1", str(job_id))


def _queued_job(line: str) -> QueuedJob | None:
    fields = line.strip().split("|")
    if len(fields) != 5 or not fields[0].isdecimal():
        return None
    return QueuedJob(int(fields[0]), *fields[1:])


def _checked(*command: str) -> None:
    done = _call(*command)
    if done.returncode != 0:
        raise _unreachable(done.stderr)


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, env=_environment(), capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL
        )
    except FileNotFoundError:
        raise ResourceError(f"this machine has no {command[0]}; run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise ResourceError(
            f"{command[0]} has not answered for {LIMIT_S} seconds; check with `scontrol ping` whether SLURM's "
            "controller answers, and with `squeue --me` what it has done, then try again"
        ) from None


def _environment() -> dict[str, str]:
    """The environment without the variables of a job that this process may run in: sbatch hands them on to the new job.

    Variables that sbatch and srun read as options are left out as well: they would override the script's options.
    """
    return {name: value for name, value in os.environ.items() if not re.match(_NOT_INHERITED, name)}


def _message(text: str) -> str:
    """SLURM's message in one line, without the names of its programs."""
    lines = [re.sub(r"^\w+: (error|fatal): ", "", line).strip() for line in text.strip().splitlines()]
    return "; ".join(dict.fromkeys(filter(None, lines))) or "it does not say why"


def _refusal(text: str, cluster_file: str) -> LladaError:
    """The error for a job that sbatch refused, with what to do about it."""
    message = _message(text)
    if "unable to contact slurm controller" in message.lower():
        return _unreachable(text)
    for part, key, remedy in _REMEDIES:
        if part in message.lower():
            remedy = remedy.format(partitions=_partition_names() if "{partitions}" in remedy else "")
            return ConfigError(f"{cluster_file}: {key}: SLURM refuses the job: {message}; {remedy}")
    return ConfigError(f"{cluster_file}: SLURM refuses the job: {message}")


def _unreachable(text: str) -> ResourceError:
    return ResourceError(f"SLURM: {_message(text)}; check with `scontrol ping` whether its controller answers")


def _partition_names() -> str:
    try:
        names = [line.split("|")[1] for line in partitions().splitlines()]
    except ResourceError:
        names = []
    return ", ".join(dict.fromkeys(names)) or "`sinfo` lists them"
