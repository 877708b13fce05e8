"""`llada bench chaos`: faults at random into one run on a real SLURM, which must end as if nothing had happened.

The same small run is trained twice, as jobs of two nodes on a SLURM that this command starts on this machine: once left
alone, and once disturbed by a plan of faults drawn from a seed (see `faults.drawing`). Everything is done and read from
outside: processes, files, and what the job notes.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.console import message
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.tools.bench.claims import Claim, at_least, at_most, reported

if TYPE_CHECKING:
    from llada_megatron.tools.bench.faults.course import FaultOutcome
    from llada_megatron.tools.bench.faults.small_run import Submitted, Workplace
    from llada_megatron.tools.bench.private_slurm import PrivateSlurm

SPACING = 8
"""Steps per fault: more than lie between two checkpoints, so that there is a newer one after most faults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many faults, which ones, and where."""
    parser.add_argument("--faults", type=int, default=21, metavar="N", help="how many (default 21, three of each kind)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws the plan (default 0)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep both runs here (default: a temporary folder)")


def run(args: argparse.Namespace) -> list[Claim]:
    """Train undisturbed, then disturbed; compare."""
    from llada_megatron.tools.bench import private_slurm
    from llada_megatron.tools.bench.faults import drawing
    from llada_megatron.tools.bench.faults.small_run import Workplace

    if missing := private_slurm.missing_programs():
        raise ResourceError(private_slurm.how_to_install(missing))
    plan = drawing.draw(args.seed, args.faults, SPACING)
    steps = f"training.steps={SPACING * (args.faults + 2)}"
    temporary = nullcontext(str(args.work.absolute())) if args.work else tempfile.TemporaryDirectory(prefix="llada-")
    with temporary as folder, private_slurm.PrivateSlurm() as slurm:
        place = Workplace(Path(folder), slurm)
        calm = _undisturbed(place, slurm, steps)
        job, recoveries = _disturbed(place, slurm, plan, steps)
        return [*_outcome(calm, job, len(plan), recoveries), *_costs(calm, job, recoveries)]


def _undisturbed(place: Workplace, slurm: PrivateSlurm, steps: str) -> Submitted:
    message("the undisturbed run")
    job = place.submit(steps, "output_dir=undisturbed")
    _wait_for_end(slurm, job)
    return job


def _disturbed(
    place: Workplace, slurm: PrivateSlurm, plan: Sequence, steps: str
) -> tuple[Submitted, list[FaultOutcome]]:
    """The disturbed run saves in the background, where the installed versions can."""
    from llada_megatron.tools.bench.faults import course, not_a_number

    message("the disturbed run")
    hook = not_a_number.prepare(place.folder / "hook")
    cluster = place.cluster("disturbed.yaml", python_path=[str(hook)])
    job = place.submit(steps, "output_dir=disturbed", "checkpoint.asynchronous=true", cluster=cluster)
    recoveries = course.disturb(slurm, job, plan, hook)
    _wait_for_end(slurm, job)
    return job, recoveries


def _wait_for_end(slurm: PrivateSlurm, job: Submitted) -> None:
    from llada_megatron.tools.bench.faults import watching

    watching.wait_until(lambda: slurm.state(job.id) in watching.OVER, f"the end of job {job.id}", 1800, 0.5)


def _outcome(calm: Submitted, job: Submitted, planned: int, recoveries: Sequence[FaultOutcome]) -> list[Claim]:
    """What must hold."""
    from llada_megatron.parallel.checkpoint import manifest as manifests
    from llada_megatron.tools.bench.faults import watching

    expected, found = watching.curve(calm.output_dir), watching.curve(job.output_dir)
    unlike = abs(len(expected) - len(found)) + sum(a != b for a, b in zip(expected, found, strict=False))
    last = manifests.step_name(len(expected))
    different = watching.different_tensors(*(each.output_dir / "checkpoints" / last for each in (calm, job)))
    bad = sum(recovery.fault.kind == "NaN" for recovery in recoveries)
    return [
        at_least("faults that struck the run", len(recoveries), "", planned),
        at_least("steps of the disturbed run", len(found), "", len(expected)),
        at_most("steps lost although a whole checkpoint held them", sum(r.lost for r in recoveries), "", 0),
        at_most("steps whose loss, gradient norm or learning rate differs from the undisturbed run", unlike, "", 0),
        at_most("tensors of the final checkpoint that differ in any bit", len(different), "", 0),
        at_least("NaNs that the job's output tells of", watching.noted_steps(job.directory), "", bad),
    ]


def _costs(calm: Submitted, job: Submitted, recoveries: Sequence[FaultOutcome]) -> list[Claim]:
    """What the faults and the saves took."""
    from llada_megatron.tools.bench.faults import watching
    from llada_megatron.tools.bench.faults.drawing import KINDS

    claims = []
    for kind in KINDS:
        took = [recovery.seconds for recovery in recoveries if recovery.fault.kind == kind]
        if took:
            claims.append(reported(f"{kind} ({len(took)}): to training again, median", statistics.median(took), "s"))
            claims.append(reported(f"{kind}: to training again, longest", max(took), "s"))
    repeated = [recovery.repeated for recovery in recoveries if recovery.began is not None]
    if repeated:
        claims.append(reported("steps done again after a restart, mean", statistics.mean(repeated), ""))
    claims.append(reported("starts of the ranks", len(watching.events(job.directory, "start")), ""))
    attempts = {event["attempt"] for event in watching.events(job.directory)}
    claims.append(reported("times the job was queued again", len(attempts) - 1, ""))
    for name, each in (("at once", calm), ("in the background", job)):
        lost = watching.seconds_lost(each.output_dir)
        if lost:
            claims.append(reported(f"a save {name} takes from training, median", statistics.median(lost), "s"))
    return claims
