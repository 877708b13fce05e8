"""`llada bench gpu`: everything that a GPU has to show, in one command of at most eight minutes.

Each measurement is on the disk the moment it is known; the same command with the same `--output` leaves out what is
known and does what failed or was cut once more. Without a GPU every part runs at the size of a test: its figures say
that it runs, and no goal is judged by them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from llada_megatron.console import message
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.tools.bench import Claim, reported
from llada_megatron.tools.bench.gpu.parts import BY_NAME, Part, chosen, planned_seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which parts, and where their results go."""
    parser.add_argument("--only", action="append", choices=list(BY_NAME), metavar="PART", help=_parts_help())
    parser.add_argument("--plan", action="store_true", help="print what would run and for how long, and run nothing")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("bench-gpu.jsonl"),
        metavar="FILE.jsonl",
        help="results, written as they are known; what the file holds is not measured again (default %(default)s)",
    )
    parser.add_argument(
        "--minutes", type=_minutes, default=8.0, metavar="N", help="the command ends after these (default %(default)g)"
    )


def _parts_help() -> str:
    return f"only this part, with what it needs; can be given several times. Parts: {', '.join(BY_NAME)}"


def _minutes(text: str) -> float:
    value = float(text)
    if not 0.5 <= value <= 600:
        raise argparse.ArgumentTypeError(f"between 0.5 and 600, found {text}")
    return value


def run(args: argparse.Namespace) -> list[Claim]:
    """Runs what is left to do, and returns the claims of all that the file holds of the chosen parts.

    Raises:
        ConfigError: the file holds results of another machine, or something else.
        ResourceError: torch cannot tell what this machine has.
    """
    began = time.monotonic()
    parts = chosen(args.only)
    if args.plan:
        return plan(parts)
    from llada_megatron.tools.bench.gpu.goals import claims
    from llada_megatron.tools.bench.gpu.measured_machine import find_machine
    from llada_megatron.tools.bench.gpu.results_file import ResultsFile
    from llada_megatron.tools.bench.gpu.supervision import Supervisor
    from llada_megatron.tools.bench.gpu.worker_process import GRACE_SECONDS

    if args.output.is_dir():
        raise ConfigError(f"--output {args.output} is a directory; give the name of a file")
    machine, results = find_machine(), ResultsFile(args.output)
    results.open_for(machine)
    if machine.toy:
        message(f"no GPU here: the figures are of a toy on {machine.device}, and no claim about GPUs is judged by them")
    message(f"{machine.describe()}; results go to {results.path}, what libraries print to {results.beside('log')}")
    Supervisor(results, machine, began + 60 * args.minutes - GRACE_SECONDS).run(parts)
    return claims(results, machine, parts)


def plan(parts: list[Part]) -> list[Claim]:
    """The estimated seconds of each part on an H100, and of all with the starts of their processes."""
    rows = [
        reported(
            f"{part.name}: {part.text}" + (" (beside the parts before it)" if part.beside else ""), part.seconds, "s"
        )
        for part in parts
    ]
    message("nothing is run: these are estimates for one H100, and what a part may take there before it is cut")
    return [*rows, reported("all, with the starts of the processes", planned_seconds(parts), "s")]
