"""Faults: a plan of them, drawn from a seed, and how each is brought about from outside the run.

Through its processes, its files and the limits of its ranks; only a NaN needs a hook in the job (`nan_hook`).
"""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import psutil

from benchmarks import nan_hook, observation
from benchmarks.private_slurm import PrivateSlurm
from benchmarks.small_run import INTERVAL, Submitted
from llada_megatron.llada_moe.errors import LladaError
from llada_megatron.parallel.checkpoint import manifest as manifests

Kind = Literal["killed rank", "killed node agent", "SIGTERM", "damaged checkpoint", "full disk", "NaN", "hang"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_FULL_AT = 2**20
"""Bytes that no file grows beyond while the disk is `full`: less than a part of a checkpoint, more than a log."""


@dataclass(frozen=True)
class PlannedFault:
    """One fault of the plan."""

    number: int
    kind: Kind
    step: int
    """It strikes once this step is done."""
    delay_s: float
    """It strikes so many seconds after that step, to hit any moment of the next one."""
    during_save: bool
    """It waits for the next checkpoint that is being written."""
    victim: float
    """Which of the ranks or nodes it strikes, as a place in [0, 1) of their list."""


def draw(seed: int, count: int, spacing: int) -> list[PlannedFault]:
    """`count` faults, one at a random step of every `spacing` after the first; all kinds in turn, in random orders."""
    random_ = random.Random(seed)
    kinds = list(_in_turns(random_, count))
    return [
        PlannedFault(
            number=number,
            kind=kind,
            step=spacing * (number + 1) + random_.randrange(1, spacing),
            delay_s=random_.uniform(0, 0.4),
            during_save=random_.random() < 0.4,
            victim=random_.random(),
        )
        for number, kind in enumerate(kinds)
    ]


def _in_turns(random_: random.Random, count: int) -> Iterator[Kind]:
    """All kinds in a random order, then all of them again."""
    left: list[Kind] = []
    for _ in range(count):
        if not left:
            left = random_.sample(KINDS, len(KINDS))
        yield left.pop()


class Injector:
    """Brings the faults of a plan about in one running job."""

    def __init__(self, slurm: PrivateSlurm, job: Submitted, hook: Path) -> None:
        """`hook`: folder of `nan_hook.prepare` that the job has on PYTHONPATH."""
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
        """Bring `fault` about now, in a run that has started its ranks; returns what it struck.

        Raises:
            LladaError: no process is there that it could strike, or it had no effect.
        """
        return self._by_kind[fault.kind](fault)

    def _kill_rank(self, fault: PlannedFault) -> str:
        return _send(_one(observation.ranks(self._slurm), fault), signal.SIGKILL)

    def _kill_agent(self, fault: PlannedFault) -> str:
        return _send(_one(self._slurm.processes(observation.AGENT), fault), signal.SIGKILL)

    def _terminate(self, fault: PlannedFault) -> str:
        return _send(_one(self._slurm.processes(observation.AGENT), fault), signal.SIGTERM)

    def _hang(self, fault: PlannedFault) -> str:
        return _send(_one(observation.ranks(self._slurm), fault), signal.SIGSTOP)

    def _damage(self, fault: PlannedFault) -> str:
        """Invert bytes in the middle of the newest checkpoint's largest file, and kill a rank, so that it is read.

        An older checkpoint has to be there: a run whose only one is damaged ends, and asks a person.
        """
        found = observation.wait_until(self._two_checkpoints, "two checkpoints")
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
        """Limit the size of the ranks' files until the next save is over."""
        output = self._job.output_dir
        due = (observation.last_step(output) // INTERVAL + 1) * INTERVAL
        with _limited(observation.ranks(self._slurm), _FULL_AT) as count:
            observation.wait_for_step(output, due + 2, limit_s=120)
        if (output / "checkpoints" / manifests.step_name(due)).exists():
            raise LladaError(f"the checkpoint of step {due} was written on a full disk")
        return f"{count} ranks over the save of step {due}"

    def _not_a_number(self, fault: PlannedFault) -> str:
        request = nan_hook.request_path(self._hook)
        request.touch()
        observation.wait_until(lambda: not request.exists(), "a rank that takes the NaN", 60, 0.02)
        return f"a rank, about step {observation.last_step(self._job.output_dir) + 1}"


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
        who = f"rank {environment['RANK']}" if observation.RANK in process.cmdline() else "agent"
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
