"""The program of one process of `llada bench gpu`: it runs a group of parts, one after another.

Its output and the stacks of a part that does not come to an end go to a log file; what is for people goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from llada_megatron.llada_moe.model import accelerations
from llada_megatron.parallel.parent_death import die_with_parent
from llada_megatron.tools.bench.gpu.measured_machine import Machine
from llada_megatron.tools.bench.gpu.part_run import BrokenContextError, run_part
from llada_megatron.tools.bench.gpu.parts import BY_NAME, EXACT_LOCAL, ON_CPU, Part
from llada_megatron.tools.bench.gpu.results_file import ResultsFile

START_ANEW = 75
"""Exit code: CUDA is of no use in this process any more, and parts are left."""
GRACE_SECONDS = 20
"""A part that is late by half of its time and this much hangs: its process is ended. So is one that still runs this
long after the command's time."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that the command line names; returns the exit code."""
    parser = argparse.ArgumentParser()
    for name in ("--output", "--process", "--machine", "--parts"):
        parser.add_argument(name, required=True)
    parser.add_argument("--until", type=float, required=True, help="of time.monotonic(), which all processes share")
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started this one, which ends it
    die_with_parent(args.parent)
    results = ResultsFile(Path(args.output))
    log = _redirect_output(results.beside("log"))
    log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {args.process}: {args.parts}\n")
    if args.process == EXACT_LOCAL:
        accelerations.hide("transformer_engine")
    code = run_group(
        [BY_NAME[name] for name in args.parts.split(",")],
        results,
        Machine(**json.loads(args.machine)),
        args.until,
        log,
        threads=max(1, (os.cpu_count() or 2) // 2) if args.process == ON_CPU else None,
    )
    return _leave(code)


def run_group(
    parts: Sequence[Part],
    results: ResultsFile,
    machine: Machine,
    until: float,
    log: TextIO | None = None,
    threads: int | None = None,
) -> int:
    """Run parts in this process, each as long as its time allows; returns the exit code.

    `log`: that of a process of its own, which is ended where a part hangs or CUDA stops answering; None = this process
    is not to be ended.
    """
    import torch

    from llada_megatron.tools.bench.measurement import single_process

    if threads:
        torch.set_num_threads(threads)
    with single_process():
        for part in parts:
            if time.monotonic() > until:
                break  # it is left for the next start
            with _ended_if_it_hangs(min(part.seconds * 1.5, until - time.monotonic()) + GRACE_SECONDS, log):
                try:
                    run_part(part, results, machine, until)
                except BrokenContextError:
                    return START_ANEW if log is None else _leave(START_ANEW)
    return 0


def _leave(code: int) -> NoReturn:
    """End the process at once: a broken CUDA context, or NCCL's threads, may wait for ever at an orderly end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextlib.contextmanager
def _ended_if_it_hangs(seconds: float, log: TextIO | None) -> Iterator[None]:
    """A process that waits for a GPU cannot be interrupted from Python: this ends it, with all stacks in the log."""
    if log is None:
        yield
        return
    faulthandler.dump_traceback_later(seconds, exit=True, file=log)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _redirect_output(path: Path) -> TextIO:
    """Send what libraries print to the log; `sys.stderr` stays the terminal."""
    log = open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    terminal = open(os.dup(2), "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    for number in (1, 2):
        os.dup2(log.fileno(), number)
    sys.stdout, sys.stderr = log, terminal
    faulthandler.enable(log)
    logging.basicConfig(stream=log, force=True)
    logging.captureWarnings(True)
    return log


if __name__ == "__main__":
    sys.exit(main())
