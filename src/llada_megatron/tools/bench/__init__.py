"""Benchmarks: `llada bench NAME` measures on this machine and prints each figure beside its goal."""

from __future__ import annotations

import argparse
import importlib

from llada_megatron.console import emit_json, message
from llada_megatron.tools.bench.claims import Claim, format_table

BENCHMARKS = {
    "parity": "gradients and loss of every parallel layout against one process",
    "train": "tokens/s and model-FLOPs utilisation of a training step, against transformers",
    "convert": "memory and speed of conversion from and to Hugging Face, against a plain copy of the files",
    "loss": "memory and time of the output layer and loss at a large vocabulary",
    "chaos": "faults at random into a run on a real SLURM of this machine, against the same run left alone",
    "sample": "time, forward passes and quality of every sampling preset, against the samplers of LLaDA and Fast-dLLM",
}
"""Name (a module of this package) and what it measures. A module exposes add_arguments(parser), run(args) -> claims."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds one sub-command per benchmark; their modules are light until they run."""
    names = parser.add_subparsers(dest="benchmark", metavar="NAME", required=True)
    for name, text in BENCHMARKS.items():
        benchmark = names.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        _module(name).add_arguments(benchmark)


def run(args: argparse.Namespace) -> int:
    """Runs one benchmark and prints its claims. A goal that is not met is a result, not an error: the status is 0."""
    claims: list[Claim] = _module(args.benchmark).run(args)
    print(format_table(claims), flush=True)
    failed = sum(claim.holds is False for claim in claims)
    if failed:
        message(f"{failed} of {len(claims)} figures miss their goal")
    if args.json:
        emit_json({"benchmark": args.benchmark, "claims": [claim.to_dict() for claim in claims]})
    return 0


def _module(name: str) -> object:
    return importlib.import_module(f"llada_megatron.tools.bench.{name}")
