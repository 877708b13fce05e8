"""The command line of a benchmark of this folder, with the options, output and exit codes of `llada bench`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from types import ModuleType

from llada_megatron.cli import guarded
from llada_megatron.tools.bench import add_require, report


def main(name: str, benchmark: ModuleType, arguments: Sequence[str] | None = None) -> int:
    """Run a benchmark, print its claims, and return the exit code.

    Args:
        name: of the benchmark in the JSON result.
        benchmark: a module with `add_arguments(parser)` and `run(args) -> claims`, as in `llada bench`.
        arguments: the command line; None = that of this process.
    """
    module = benchmark.__spec__.name if benchmark.__spec__ else name
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=benchmark.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmark.add_arguments(parser)
    add_require(parser)
    parser.add_argument("--json", action="store_true", help="end stdout with one JSON object")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error was raised")
    args = parser.parse_args(arguments)
    args.traceback |= os.environ.get("LLADA_TRACEBACK") == "1"
    return guarded(lambda: report(name, benchmark.run(args), args.json, args.require), args)
