"""`llada bench plan`: what `llada plan` predicts, against published measurements of training runs.

Memory is predicted from sizes alone. Time needs constants that no data sheet has: one set for each kind of GPU,
fitted on at most a third of its published runs and tried on the others; which is which depends on names only and is
printed. Runs with something that is not modelled are named with the reason and count for neither goal.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.console import message
from llada_megatron.tools.bench import Claim, at_least, at_most, reported

if TYPE_CHECKING:
    from llada_megatron.llada_moe.planning.gpu_sheet import GpuSheet
    from llada_megatron.tools.bench.planning.published_runs import PublishedRun

MEMORY_WITHIN, MEMORY_GOAL = 0.03, 0.9
CPU_WITHIN = 0.05
TIME_MEDIAN, TIME_WITHIN, TIME_GOAL = 0.08, 0.15, 0.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which cases, and whether the constants are fitted anew."""
    parser.add_argument("--cases", metavar="FILE", help="other published runs, a JSON file in the form of ours")
    parser.add_argument("--fit", action="store_true", help="fit the constants anew, print and use them")
    parser.add_argument(
        "--cpu", action="store_true", help="instead: train small models here under 14 layouts and measure all processes"
    )


@dataclass(frozen=True)
class Row:
    """A run with its prediction."""

    run: PublishedRun
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted / self.measured - 1


def run(args: argparse.Namespace) -> list[Claim]:
    """Prints each run, the split and what is left out; returns the figures with their goals."""
    if args.cpu:
        return cpu_claims()
    runs = modelled(None if args.cases is None else Path(args.cases))
    memory = memory_rows(runs)
    print_rows("peak allocated memory, GiB", memory, 2**30)
    times = time_rows(runs, args.fit)
    print_rows("step time on runs that the constants were not fitted on, s", times, 1)
    return claims(memory, times)


def cpu_claims() -> list[Claim]:
    """Runs on this machine's CPUs: memory of all processes against what is predicted."""
    from llada_megatron.tools.bench.planning.cpu_runs import cpu_rows

    with tempfile.TemporaryDirectory(prefix="llada-plan-") as folder:
        rows = cpu_rows(Path(folder))
    print("memory of all processes, MiB: predicted, measured, error; against the peak of each; share of tensors")
    for row in rows:
        figures = f"{row.predicted / 2**20:8.0f} {row.measured.together / 2**20:8.0f} {row.error:+7.1%}"
        print(f"  {figures} {row.error_of_each:+7.1%} {row.tensors / row.predicted:5.0%}  {row.name}")
    within = [abs(row.error) <= CPU_WITHIN for row in rows]
    return [
        at_least(f"share of {len(rows)} CPU runs within 5 %", sum(within) / len(rows), "", 1.0),
        reported("largest error of a CPU run", max(abs(row.error) for row in rows) * 100, "%"),
        reported("largest error against the peaks of each process", max(abs(r.error_of_each) for r in rows) * 100, "%"),
    ]


def claims(memory: list[Row], times: list[Row]) -> list[Claim]:
    """The figures with their goals; nothing to compare is no success."""
    near = [abs(row.error) <= MEMORY_WITHIN for row in memory]
    quick = [abs(row.error) for row in times]
    if not near and not quick:
        return [reported("runs that can be compared", 0, "")]
    found = []
    if near:
        found.append(at_least(f"share of {len(near)} peaks within 3 %", sum(near) / len(near), "", MEMORY_GOAL))
        found.append(reported("largest error of a peak", max(abs(row.error) for row in memory) * 100, "%"))
    if quick:
        within = sum(error <= TIME_WITHIN for error in quick) / len(quick)
        found.append(at_most(f"median error of {len(quick)} step times", statistics.median(quick), "", TIME_MEDIAN))
        found.append(at_least(f"share of {len(quick)} step times within 15 %", within, "", TIME_GOAL))
    return found


def modelled(path: Path | None) -> list[PublishedRun]:
    """The runs that can be expressed; says which cannot, and why."""
    from llada_megatron.tools.bench.planning.published_runs import NotModelled, published_run, read_cases

    runs, left_out = [], Counter()
    for case in read_cases(path):
        try:
            runs.append(published_run(case))
        except NotModelled as reason:
            left_out[str(reason)] += 1
    for reason, count in left_out.items():
        message(f"{count} runs left out: {reason}")
    return runs


def memory_rows(runs: list[PublishedRun]) -> list[Row]:
    """One row for each measured peak: cases that share a measurement count once."""
    from llada_megatron.llada_moe.planning.memory import fullest, memory_by_stage

    rows: dict[tuple[str, str, float], Row] = {}
    for each in runs:
        if each.peak_bytes is None:
            continue
        if each.memory_label:
            message(f"memory of {each.name} not predicted: {each.memory_label}")
            continue
        stages = memory_by_stage(each.workload)
        stage = fullest(stages) if each.every_rank else stages[-1]
        rows.setdefault((each.group, each.gpu, each.peak_bytes), Row(each, stage.allocated, each.peak_bytes))
    return list(rows.values())


def time_rows(runs: list[PublishedRun], refit: bool) -> list[Row]:
    """Rows of the runs that the constants of their GPU were not fitted on; prints the split."""
    from llada_megatron.llada_moe.planning.gpu_sheet import load_gpu
    from llada_megatron.llada_moe.planning.step_time import step_time
    from llada_megatron.tools.bench.planning.fitting import fit, split

    rows = []
    for name, timed in sorted(by_gpu(runs).items()):
        parts = split(timed)
        gpu = load_gpu(name)
        message(f"{name}: constants fitted on {len(parts.fitted)} of {len(timed)} runs:")
        for each in parts.fitted:
            message(f"  {each.name}")
        if refit:
            gpu = fit(gpu, parts.fitted)
            print_constants(name, gpu)
        rows += [Row(each, step_time(each.workload, gpu).total, each.step_s) for each in parts.tried if each.step_s]
    return rows


def by_gpu(runs: list[PublishedRun]) -> dict[str, list[PublishedRun]]:
    """The runs whose time is predicted, by GPU; says which times are not, and why."""
    found: dict[str, list[PublishedRun]] = {}
    labels: Counter[str] = Counter()
    for each in runs:
        if each.step_s is None:
            continue
        if each.time_label:
            labels[each.time_label] += 1
        else:
            found.setdefault(each.gpu, []).append(each)
    for label, count in labels.items():
        message(f"time of {count} runs not predicted: {label}")
    return found


def print_constants(name: str, gpu: GpuSheet) -> None:
    """The lines of configs/gpus/NAME.yaml that a fit gives."""
    from llada_megatron.tools.bench.planning.fitting import LIMITS

    print(f"{name}:")
    for key in LIMITS:
        print(f"  {key}: {getattr(gpu, key):.4g}")


def print_rows(title: str, rows: list[Row], unit: float) -> None:
    """Each run with predicted, measured and error."""
    print(title)
    for row in sorted(rows, key=lambda row: (row.run.gpu, row.run.name)):
        print(f"  {row.predicted / unit:10.2f} {row.measured / unit:10.2f} {row.error:+7.1%}  {row.run.name}")
