"""A fault run: each fault of a plan, what it cost, and how long it took until training went on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import faults, observation
from benchmarks.faults import Kind, PlannedFault
from benchmarks.private_slurm import PrivateSlurm
from benchmarks.small_run import Submitted
from llada_megatron.console import message
from llada_megatron.llada_moe.errors import LladaError
from llada_megatron.parallel.training.metrics_file import FILE_NAME

RESTARTING: tuple[Kind, ...] = ("killed rank", "killed node agent", "SIGTERM", "damaged checkpoint", "hang")
"""Kinds after which the ranks start again; training goes on through the others."""
_LIMIT_S = 500.0
"""The longest time from a fault to training again; a run that takes longer does not recover."""


@dataclass(frozen=True)
class FaultOutcome:
    """What came of one fault."""

    fault: PlannedFault
    step: int
    """The newest finished step when it struck."""
    seconds: float
    """Time until the first step after it was done; after a restart, until the first step that was new."""
    whole: int
    """Step of the newest whole checkpoint after the fault had struck (0: none)."""
    began: int | None
    """Step that training went on from; None where nothing started again."""

    @property
    def lost(self) -> int:
        """Steps that a whole checkpoint held and the run did again all the same."""
        return 0 if self.began is None else max(0, self.whole - self.began)

    @property
    def repeated(self) -> int:
        """Steps that were done again, because no checkpoint held them."""
        return 0 if self.began is None else max(0, self.step - self.began)


def disturb(slurm: PrivateSlurm, job: Submitted, plan: Sequence[PlannedFault], hook: Path) -> list[FaultOutcome]:
    """Bring every fault of `plan` about in its turn, each once training really goes on after the one before.

    Raises:
        LladaError: the run ended, or did not recover from a fault.
    """
    inject, found = faults.Injector(slurm, job, hook), []
    for fault in plan:
        wait_alive(slurm, job, fault.step)
        if fault.during_save and fault.kind in RESTARTING:
            faults.wait_for_save(job.output_dir)
        else:
            time.sleep(fault.delay_s)
        found.append(_one(slurm, job, fault, inject))
        last = found[-1]
        again = "went on" if last.began is None else f"again from step {last.began}, {last.repeated} steps repeated"
        message(f"  {again} after {last.seconds:.1f} s")
    return found


def _one(slurm: PrivateSlurm, job: Submitted, fault: PlannedFault, inject: faults.Injector) -> FaultOutcome:
    step, struck, output = observation.last_step(job.output_dir), time.time(), observation.output_size(job.directory)
    message(f"fault {fault.number + 1}, {fault.kind}, after step {step}{' in a save' * fault.during_save}")
    message(f"  {inject(fault)}")
    whole = observation.newest_whole(job.output_dir)
    if fault.kind not in RESTARTING:
        wait_alive(slurm, job, observation.last_step(job.output_dir) + 1)
        return FaultOutcome(fault, step, time.time() - struck, whole, None)
    began = wait_for_start(slurm, job, struck, output)
    return FaultOutcome(fault, step, time.time() - struck, whole, began)


def wait_for_start(slurm: PrivateSlurm, job: Submitted, since: float, output_before: int) -> int:
    """Wait for the first step of a start that began after `since`; returns the step it went on from.

    `output_before`: bytes of the job's output at that time. The line about the checkpoint that a rank continues
    from comes after them, and after the metrics of the steps that are done again have been dropped.
    """
    metrics = job.output_dir / FILE_NAME

    def first_step() -> list[int]:
        _require_alive(slurm, job)
        starts = [event for event in observation.events(job.directory, "start") if event["time"] > since]
        if not starts or not metrics.exists() or metrics.stat().st_mtime <= starts[-1]["time"]:
            return []
        reported = observation.continued_from(job.directory, output_before)
        if not reported and starts[-1]["checkpoint"]:
            return []
        began = reported[-1] if reported else 0
        return [began] if observation.last_step(job.output_dir) > began else []

    return observation.wait_until(first_step, "training after a fault", _LIMIT_S, 0.05)[0]


def wait_alive(slurm: PrivateSlurm, job: Submitted, step: int) -> None:
    """Wait until the metrics hold `step`. Raises LladaError: the job ended before."""

    def reached() -> bool:
        _require_alive(slurm, job)
        return observation.last_step(job.output_dir) >= step

    observation.wait_until(reached, f"step {step}", _LIMIT_S, 0.05)


_asked_at: dict[int, float] = {}


def _require_alive(slurm: PrivateSlurm, job: Submitted) -> None:
    """Raises LladaError where SLURM has ended the job; asks it once a second."""
    if time.monotonic() - _asked_at.get(job.id, 0) < 1:
        return
    _asked_at[job.id] = time.monotonic()
    if (state := slurm.state(job.id)) in observation.OVER:
        output = (job.directory / "job.out").read_text(errors="replace").splitlines()[-20:]
        raise LladaError(f"job {job.id} ended ({state or 'unknown'}); its output:\n" + "\n".join(output))
