"""Faults at random into one run on a real SLURM, which must end as if nothing had happened.

The same small run is trained twice, as jobs of two nodes on a SLURM that this command starts on this machine: once left
alone, and once disturbed by a plan of faults that is drawn from a seed. Faults are brought about from outside, through
processes and files, and what came of them is read from the files of the run and of the job.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.command import main
from llada_megatron.console import message
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.tools.bench import Claim, at_least, at_most, reported

if TYPE_CHECKING:
    from benchmarks.fault_run import FaultOutcome
    from benchmarks.faults import PlannedFault
    from benchmarks.private_slurm import PrivateSlurm
    from benchmarks.small_run import Submitted, Workplace

SPACING = 8
"""Steps per fault: more than lie between two checkpoints, so that there is a newer one after most faults."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many faults, which ones, and where."""
    parser.add_argument("--faults", type=int, default=21, metavar="N", help="how many (default 21, three of each kind)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="draws the plan (default 0)")
    parser.add_argument("--work", type=Path, metavar="DIR", help="keep both runs here (default: a temporary folder)")


def run(args: argparse.Namespace) -> list[Claim]:
    """Trains the run undisturbed, then disturbed, and compares the two."""
    from benchmarks import faults, private_slurm
    from benchmarks.small_run import Workplace

    if missing := private_slurm.missing_programs():
        raise ResourceError(private_slurm.how_to_install(missing))
    plan = faults.draw(args.seed, args.faults, SPACING)
    steps = f"training.steps={SPACING * (args.faults + 2)}"
    temporary = nullcontext(str(args.work.absolute())) if args.work else tempfile.TemporaryDirectory(prefix="llada-")
    with temporary as folder, private_slurm.PrivateSlurm() as slurm:
        workplace = Workplace(Path(folder), slurm)
        calm = _undisturbed(workplace, slurm, steps)
        job, outcomes = _disturbed(workplace, slurm, plan, steps)
        return [*_comparison(calm, job, len(plan), outcomes), *_costs(calm, job, outcomes)]


def _undisturbed(workplace: Workplace, slurm: PrivateSlurm, steps: str) -> Submitted:
    message("the undisturbed run")
    job = workplace.submit(steps, "output_dir=undisturbed")
    _wait_for_end(slurm, job)
    return job


def _disturbed(
    workplace: Workplace, slurm: PrivateSlurm, plan: Sequence[PlannedFault], steps: str
) -> tuple[Submitted, list[FaultOutcome]]:
    """The disturbed run saves in the background, where the installed versions can."""
    from benchmarks import fault_run, nan_hook

    message("the disturbed run")
    hook = nan_hook.prepare(workplace.folder / "hook")
    cluster = workplace.cluster("disturbed.yaml", python_path=[str(hook)])
    job = workplace.submit(steps, "output_dir=disturbed", "checkpoint.asynchronous=true", cluster=cluster)
    outcomes = fault_run.disturb(slurm, job, plan, hook)
    _wait_for_end(slurm, job)
    return job, outcomes


def _wait_for_end(slurm: PrivateSlurm, job: Submitted) -> None:
    from benchmarks import observation

    observation.wait_until(lambda: slurm.state(job.id) in observation.OVER, f"the end of job {job.id}", 1800, 0.5)


def _comparison(calm: Submitted, job: Submitted, planned: int, outcomes: Sequence[FaultOutcome]) -> list[Claim]:
    """What must hold: the disturbed run beside the undisturbed one."""
    from benchmarks import observation
    from llada_megatron.parallel.checkpoint import manifest as manifests

    expected, found = observation.curve(calm.output_dir), observation.curve(job.output_dir)
    unlike = abs(len(expected) - len(found)) + sum(a != b for a, b in zip(expected, found, strict=False))
    last = manifests.step_name(len(expected))
    different = observation.different_tensors(*(each.output_dir / "checkpoints" / last for each in (calm, job)))
    bad = sum(outcome.fault.kind == "NaN" for outcome in outcomes)
    return [
        at_least("faults that struck the run", len(outcomes), "", planned),
        at_least("steps of the disturbed run", len(found), "", len(expected)),
        at_most("steps lost although a whole checkpoint held them", sum(outcome.lost for outcome in outcomes), "", 0),
        at_most("steps whose loss, gradient norm or learning rate differs from the undisturbed run", unlike, "", 0),
        at_most("tensors of the final checkpoint that differ in any bit", len(different), "", 0),
        at_least("NaNs that the job's output tells of", observation.noted_steps(job.directory), "", bad),
    ]


def _costs(calm: Submitted, job: Submitted, outcomes: Sequence[FaultOutcome]) -> list[Claim]:
    """Reported without a goal: the time that the faults and the saves took."""
    from benchmarks import observation
    from benchmarks.faults import KINDS

    claims = []
    for kind in KINDS:
        took = [outcome.seconds for outcome in outcomes if outcome.fault.kind == kind]
        if took:
            claims.append(reported(f"{kind} ({len(took)}): to training again, median", statistics.median(took), "s"))
            claims.append(reported(f"{kind}: to training again, longest", max(took), "s"))
    repeated = [outcome.repeated for outcome in outcomes if outcome.began is not None]
    if repeated:
        claims.append(reported("steps done again after a restart, mean", statistics.mean(repeated), ""))
    claims.append(reported("starts of the ranks", len(observation.events(job.directory, "start")), ""))
    attempts = {event["attempt"] for event in observation.events(job.directory)}
    claims.append(reported("times the job was queued again", len(attempts) - 1, ""))
    for name, each in (("at once", calm), ("in the background", job)):
        lost = observation.seconds_lost(each.output_dir)
        if lost:
            claims.append(reported(f"a save {name} takes from training, median", statistics.median(lost), "s"))
    return claims


if __name__ == "__main__":
    sys.exit(main("chaos", sys.modules[__name__]))
