"""Doing things to a run from outside: its processes, its files, the limits of its ranks."""

from __future__ import annotations

import contextlib
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from llada_megatron.llada_moe.errors import LladaError
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.tools.bench.faults import not_a_number, watching
from llada_megatron.tools.bench.faults.drawing import PlannedFault
from llada_megatron.tools.bench.faults.small_run import INTERVAL, Submitted
from llada_megatron.tools.bench.private_slurm import PrivateSlurm

_FULL_AT = 2**20
"""Bytes that no file grows beyond while the disk is `full`: less than a part of a checkpoint, more than a log."""


class Injector:
    """Brings the faults of a plan about in one running job."""

    def __init__(self, slurm: PrivateSlurm, job: Submitted, hook: Path) -> None:
        """`hook`: folder of `not_a_number.prepare` that the job has on PYTHONPATH."""
        self._slurm, self._job, self._hook = slurm, job, hook
        self._by_kind = {
            "killed rank": self._kill_rank,
            "killed node agent": self._kill_agent,
            "SIGTERM": self._terminate,
            "damaged checkpoint": self._damage,
            "full disk": self._fill,
            "NaN": self._not_a_number,
            "hang": self._hang,
        }

    def __call__(self, fault: PlannedFault) -> str:
        """Bring `fault` about now; returns to whom it happened. The run has started its ranks.

        Raises:
            LladaError: there was nothing to do it to.
        """
        return self._by_kind[fault.kind](fault)

    def _kill_rank(self, fault: PlannedFault) -> str:
        return _send(_one(watching.ranks(self._slurm), fault), signal.SIGKILL)

    def _kill_agent(self, fault: PlannedFault) -> str:
        return _send(_one(self._slurm.processes(watching.AGENT), fault), signal.SIGKILL)

    def _terminate(self, fault: PlannedFault) -> str:
        return _send(_one(self._slurm.processes(watching.AGENT), fault), signal.SIGTERM)

    def _hang(self, fault: PlannedFault) -> str:
        return _send(_one(watching.ranks(self._slurm), fault), signal.SIGSTOP)

    def _damage(self, fault: PlannedFault) -> str:
        """Other bytes in the middle of the newest checkpoint's largest file; then a killed rank, so that it is read.

        An older one has to be there: a run whose only checkpoint is damaged ends, and asks a person.
        """
        found = watching.wait_until(self._two_checkpoints, "two checkpoints")
        directory = found[0][1]
        largest = max(directory.iterdir(), key=lambda path: path.stat().st_size)
        with largest.open("r+b") as stream:
            stream.seek(largest.stat().st_size // 2)
            before = stream.read(64)
            stream.seek(-len(before), 1)
            stream.write(bytes(byte ^ 0xFF for byte in before))
        return f"{directory.name}/{largest.name}, then {self._kill_rank(fault)}"

    def _two_checkpoints(self) -> list[tuple[int, Path]]:
        found = manifests.steps(self._job.output_dir / "checkpoints")
        return found if len(found) > 1 else []

    def _fill(self, fault: PlannedFault) -> str:
        """No file of a rank may grow any more over the time of the next save."""
        output = self._job.output_dir
        due = (watching.last_step(output) // INTERVAL + 1) * INTERVAL
        with _limited(watching.ranks(self._slurm), _FULL_AT) as count:
            watching.wait_for_step(output, due + 2, limit_s=120)
        if (output / "checkpoints" / manifests.step_name(due)).exists():
            raise LladaError(f"the checkpoint of step {due} was written on a full disk")
        return f"{count} ranks over the save of step {due}"

    def _not_a_number(self, fault: PlannedFault) -> str:
        ask = not_a_number.ask_path(self._hook)
        ask.touch()
        watching.wait_until(lambda: not ask.exists(), "a rank that takes the NaN", 60, 0.02)
        return f"a rank, about step {watching.last_step(self._job.output_dir) + 1}"


def wait_for_save(output_dir: Path, limit_s: float = 30) -> None:
    """Wait until a checkpoint is being written (its directory has no name yet), at most `limit_s`."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline and not any((output_dir / "checkpoints").glob(".step-*.partial-*")):
        time.sleep(0.002)


def _one(processes: Sequence[psutil.Process], fault: PlannedFault) -> psutil.Process:
    if not processes:
        raise LladaError(f"fault {fault.number}, {fault.kind}: no such process is running")
    return sorted(processes, key=_name)[int(fault.victim * len(processes))]


def _name(process: psutil.Process) -> str:
    """`rank 1 on n2`, or `agent on n2`."""
    with contextlib.suppress(psutil.Error):
        environment = process.environ()
        who = f"rank {environment['RANK']}" if watching.RANK in process.cmdline() else "agent"
        return f"{who} on {environment.get('SLURMD_NODENAME')}"
    return "one that has ended"


def _send(process: psutil.Process, number: signal.Signals) -> str:
    name = _name(process)
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
    return f"{number.name} to {name}"


@contextlib.contextmanager
def _limited(processes: Sequence[psutil.Process], size: int) -> Iterator[int]:
    """The largest file that `processes` (and what they fork) may write, in bytes."""
    before = {process: process.rlimit(psutil.RLIMIT_FSIZE) for process in processes}
    for process, (_, hard) in before.items():
        process.rlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield len(before)
    finally:
        for process, limits in before.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.rlimit(resource.RLIMIT_FSIZE, limits)
