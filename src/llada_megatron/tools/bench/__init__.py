"""Benchmarks: `llada bench NAME` measures on this machine and prints each figure beside its goal.

What only proves the project (faults into jobs of a private SLURM, other projects' samplers) is in the folder
`benchmarks` of the repository and not installed.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llada_megatron.console import emit_json, message
from llada_megatron.llada_moe.errors import ConfigError

BENCHMARKS = {
    "parity": "gradients and loss of every parallel layout against one process",
    "train": "tokens/s and model-FLOPs utilisation of a training step, against transformers",
    "convert": "memory and speed of conversion from and to Hugging Face, against a plain copy of the files",
    "gpu": "everything a GPU has to show: correctness first, then speed, in at most eight minutes",
    "loss": "memory and time of the output layer and loss at a large vocabulary",
    "attention": "bytes written and time of attention over packed documents, against a loop over slices",
    "plan": "memory and step time that `llada plan` predicts, against published training runs",
    "experts": "what watching the experts takes of a training step",
    "likelihood": "error of estimated likelihoods, and agreement of verdicts with and without shared masks",
    "sample": "time, forward passes and quality of every sampling preset, against the paper's sampler",
    "words": "whether the laptop's fine-tuned model answers questions about new words in the format that it learnt",
    "ar-to-diffusion": "bounds of a small autoregressive model converted over growing blocks, at once, and of none",
    "cap": "tokens per forward pass and right answers after fine-tuning with and without confidence-aware training",
}
"""Name and what it measures. Its module exposes add_arguments(parser) and run(args) -> claims."""
_MODULES = {"experts": "expert_watching", "ar-to-diffusion": "ar_to_diffusion"}
"""Modules that are not named like their benchmark: another file of the repository is, or no module can be."""
MOVED = ("chaos",)
"""Names of benchmarks that were here before and are now in the folder `benchmarks`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds one sub-command per benchmark; their modules are light until they run."""
    names = parser.add_subparsers(dest="benchmark", metavar="NAME", required=True)
    for name, text in BENCHMARKS.items():
        benchmark = names.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        _module(name).add_arguments(benchmark)
        add_require(benchmark)
    # without help it is not listed; no option starts with NUL, so that any are taken as they are
    for name in MOVED:
        names.add_parser(name, add_help=False, prefix_chars="\0").add_argument("options", nargs="*")


def run(args: argparse.Namespace) -> int:
    """Runs one benchmark and prints its claims.

    Raises:
        ConfigError: it is no longer a benchmark of this command; says which command it is now.
    """
    if args.benchmark in MOVED:
        raise ConfigError(moved(f"llada bench {args.benchmark}", shlex.join([args.benchmark, *args.options])))
    return report(args.benchmark, _module(args.benchmark).run(args), args.json, args.require)


def add_require(parser: argparse.ArgumentParser) -> None:
    """The option by which a missed goal is a failure, as a script or a check needs it."""
    parser.add_argument("--require", action="store_true", help="exit with 1 if a figure misses its goal")


@dataclass(frozen=True)
class Claim:
    """One row of the result. `holds` is None where a figure is reported without a goal."""

    claim: str
    value: float
    unit: str
    goal: str
    holds: bool | None

    def to_dict(self) -> dict[str, Any]:
        """The row as it stands in the JSON result."""
        return asdict(self)


def at_least(claim: str, value: float, unit: str, goal: float) -> Claim:
    """A figure that should not be smaller than its goal."""
    return Claim(claim, value, unit, f">= {goal:g}", bool(value >= goal))


def at_most(claim: str, value: float, unit: str, goal: float) -> Claim:
    """A figure that should not be larger than its goal (a value that is not a number never holds)."""
    return Claim(claim, value, unit, f"<= {goal:g}", bool(value <= goal))


def reported(claim: str, value: float, unit: str) -> Claim:
    """A figure without a goal."""
    return Claim(claim, value, unit, "reported", None)


def format_table(claims: Sequence[Claim]) -> str:
    """The claims as aligned plain text: verdict, value with unit, goal, claim."""
    words = {True: "holds", False: "FAILS", None: ""}
    rows = [("", "measured", "goal", "claim")]
    rows += [(words[c.holds], f"{c.value:.4g} {c.unit}".strip(), c.goal, c.claim) for c in claims]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(row[i].ljust(widths[i]) for i in range(3)), row[3]]).rstrip() for row in rows)


def report(name: str, claims: Sequence[Claim], as_json: bool, require: bool) -> int:
    """Prints the claims of a benchmark; returns the exit code.

    A goal that is not met is a result, not an error; with `require` it is a failure, and the exit code is 1.
    """
    print(format_table(claims), flush=True)
    failed = sum(claim.holds is False for claim in claims)
    if failed:
        message(f"{failed} of {len(claims)} figures miss their goal")
    if as_json:
        emit_json({"benchmark": name, "claims": [claim.to_dict() for claim in claims]})
    return 1 if failed and require else 0


def moved(command: str, now: str) -> str:
    """The message for a benchmark that moved to the folder `benchmarks`: `now` is its name there and its options."""
    return f"`{command}` is now `python -m benchmarks.{now}`, in the root of a checkout of the repository"


def _module(name: str) -> object:
    return importlib.import_module(f"llada_megatron.tools.bench.{_MODULES.get(name, name)}")
