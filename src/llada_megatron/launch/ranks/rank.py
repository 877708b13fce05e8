"""How one rank runs its work: where its output goes, how it stops, what it leaves behind when it fails."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from llada_megatron.launch.ranks.rank_reports import REPORTS_VARIABLE, Failure, write_failure, write_result
from llada_megatron.parallel.coordinates import locate

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.layout import LayoutConfig

PARENT_VARIABLE = "LLADA_PARENT"
"""Environment variable with the process id of the local launcher."""


def available_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class StopRequest:
    """Whether this process was asked to stop. Call it: False until the first SIGINT or SIGTERM, then True.

    A second signal ends the process at once, unless it is `patient`: SLURM asks more than once.
    """

    def __init__(self, patient: bool = False) -> None:
        self._asked = False
        self._patient = patient
        self._numbers: tuple[signal.Signals, ...] = ()

    def listen(self, signals: Iterable[signal.Signals] = (signal.SIGINT, signal.SIGTERM)) -> StopRequest:
        """Handle `signals` from now on (main thread only); one that came during the start counts as well."""
        self._numbers = tuple(signals)
        for number in self._numbers:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)
        return self

    def ignore(self) -> None:
        """The work is done: signals no longer matter. Else they would kill a Python that is shutting down."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    def __call__(self) -> bool:
        return self._asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked and not self._patient:
            os._exit(128 + number)
        self._asked = True


Work = Callable[[StopRequest], dict[str, Any]]
"""What a rank does: receives the stop request to look at between steps, returns result for a summary."""


def log_path(log_dir: Path, rank: int) -> Path:
    """Where a rank's output and full stack traces go."""
    return log_dir / f"rank-{rank}.log"


def quieten(rank: int, log_dir: Path) -> Callable[[], None]:
    """Send what libraries print (from Python or C++), warn or log to the rank's log file; return what undoes it.

    Rank 0 keeps `sys.stderr` for its own progress and messages; the other ranks are silent.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    log = open(log_path(log_dir, rank), "a", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} rank {rank}, process {os.getpid()}\n")
    streams, terminals = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    for number, stream in enumerate(streams, start=1):
        stream.flush()
        os.dup2(log.fileno(), number)
    sys.stdout = log
    sys.stderr = open(terminals[1], "w", buffering=1, errors="backslashreplace") if rank == 0 else log  # noqa: SIM115
    logging.basicConfig(stream=log, force=True, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a log on a full disk is no reason for a stack per line
    faulthandler.enable(log)
    show_stacks_on_request(log)

    def restore() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, terminal in enumerate(terminals, start=1):
            os.dup2(terminal, number)
        sys.stdout, sys.stderr = streams

    return restore


def show_stacks_on_request(log: TextIO) -> None:
    """From now on SIGUSR2 writes the stacks of all threads to `log`, even where Python itself is stuck."""
    if hasattr(faulthandler, "register"):
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # what Python puts back when it shuts down
        faulthandler.register(signal.SIGUSR2, file=log, all_threads=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])


def run_local_rank(work: Work, layout: LayoutConfig, log_dir: Path, stop: StopRequest | None = None) -> int:
    """Run `work` as a rank that a launcher on this machine started; leave it the result or the failure; exit code.

    Without a `stop`, only SIGINT asks for one: the local launcher's SIGTERM means that another rank has failed and no
    step can be finished.
    """
    rank, reports = int(os.environ["RANK"]), Path(os.environ[REPORTS_VARIABLE])
    stop = stop or StopRequest().listen([signal.SIGINT])
    quieten(rank, log_dir)
    try:
        result = work(stop)
    except BaseException as error:
        failure = Failure.of(rank, error)
        print(f"{locate(rank, layout)} failed\n{failure.stack}", flush=True)
        write_failure(reports, failure)
        _leave_at_once(1)
    stop.ignore()
    if rank == 0:
        write_result(reports, result)
    return 0


def run_joined_rank(work: Work, layout: LayoutConfig, log_dir: Path, rank: int) -> tuple[dict[str, Any], bool]:
    """Run `work` as a rank that torchrun or srun started; return its result and whether it was asked to stop.

    A failure ends the process here, after one line with the rank's coordinates on stderr.
    """
    stop = StopRequest().listen([signal.SIGINT, signal.SIGTERM])
    restore = quieten(rank, log_dir)
    try:
        result = work(stop)
        restore()
        return result, stop()
    except BaseException as error:
        failure = Failure.of(rank, error)
        print(f"{locate(rank, layout)} failed\n{failure.stack}", flush=True)
        restore()
        print(f"error: {describe(failure, layout, log_dir)}", file=sys.stderr, flush=True)
        _leave_at_once(failure.user_error.exit_code if failure.user_error else 1)


def describe(failure: Failure, layout: LayoutConfig, log_dir: Path) -> str:
    """A failure in one line: who, what, and where the full stack is. An error of the user's needs its message only."""
    if failure.user_error:
        return failure.message
    return f"{locate(failure.rank, layout)}: {failure.headline}; full stack: {log_path(log_dir, failure.rank)}"


def _leave_at_once(code: int) -> NoReturn:
    """End without the clean-up of process groups, which would wait for ranks that may no longer answer."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
