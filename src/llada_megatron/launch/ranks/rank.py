"""How one rank runs its work: where its output goes, how it stops, and how it reports a failure."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from llada_megatron.launch.ranks.rank_reports import REPORTS_VARIABLE, Failure, write_failure, write_result
from llada_megatron.llada_moe.errors import MemoryRanOutError
from llada_megatron.memory_ran_out import GENERAL
from llada_megatron.parallel.coordinates import locate

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.layout import LayoutConfig

PARENT_VARIABLE = "LLADA_PARENT"
"""Environment variable with the process id of the local launcher."""


def available_cores() -> int:
    """The number of cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class StopRequest:
    """Whether this process was asked to stop: calling it gives False until the first signal, then True.

    A second signal ends the process at once, unless the request is `patient`: SLURM sends its signal more than once.
    """

    def __init__(self, patient: bool = False) -> None:
        self._asked = False
        self._patient = patient
        self._numbers: tuple[signal.Signals, ...] = ()

    def listen(self, signals: Iterable[signal.Signals] = (signal.SIGINT, signal.SIGTERM)) -> StopRequest:
        """Handle `signals` from now on (main thread only); one that was blocked until now is handled at once."""
        self._numbers = tuple(signals)
        for number in self._numbers:
            signal.signal(number, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._numbers)
        return self

    def ignore(self) -> None:
        """Ignore the signals once the work is done; they would kill Python while it shuts down."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    def __call__(self) -> bool:
        return self._asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked and not self._patient:
            os._exit(128 + number)
        self._asked = True


Work = Callable[[StopRequest], dict[str, Any]]
"""What a rank does: it looks at the stop request between steps, and returns the result that rank 0 reports."""


def log_path(log_dir: Path, rank: int) -> Path:
    """The file for a rank's output and full stack traces."""
    return log_dir / f"rank-{rank}.log"


def quieten(rank: int, log_dir: Path) -> Callable[[], None]:
    """Send what libraries print (from Python or C++), warn or log to the rank's log file.

    Returns a function that undoes it. Rank 0 keeps `sys.stderr` for its own progress and messages; the other ranks
    print nothing to the terminal.
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
    logging.getLogger("llada_megatron").setLevel(logging.INFO)  # of libraries, warnings only
    logging.captureWarnings(True)
    before, threading.excepthook = threading.excepthook, _log_thread_failure
    logging.raiseExceptions = False  # otherwise a full disk causes a stack trace for every line
    faulthandler.enable(log)
    show_stacks_on_request(log)

    def restore() -> None:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for number, terminal in enumerate(terminals, start=1):
            os.dup2(terminal, number)
        sys.stdout, sys.stderr = streams
        threading.excepthook = before

    return restore


def _log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """A thread of a library that fails, such as TensorBoard's where its folder went away, is for the log only."""
    logging.getLogger(__name__).warning("a thread failed: %s", failure.exc_value, exc_info=failure.exc_value)


def show_stacks_on_request(log: TextIO) -> None:
    """Have SIGUSR2 write the stacks of all threads to `log`, even while Python itself is stuck."""
    if hasattr(faulthandler, "register"):
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the action that Python restores when it shuts down
        faulthandler.register(signal.SIGUSR2, file=log, all_threads=True)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])


def run_local_rank(work: Work, layout: LayoutConfig, log_dir: Path, stop: StopRequest | None = None) -> int:
    """Run `work` as a rank that a launcher on this machine started, and report its result or failure to the launcher.

    Returns the exit code. Without a `stop`, only SIGINT asks the rank to stop: a SIGTERM of the local launcher means
    that another rank has failed and no step can be finished.
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
    """Run `work` as a rank that torchrun or srun started; returns its result and whether it was asked to stop.

    A failure prints one line with the rank's coordinates to stderr and ends the process.
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
        general = f"; {GENERAL}" if failure.user_error is MemoryRanOutError else ""
        print(f"error: {describe(failure, layout, log_dir)}{general}", file=sys.stderr, flush=True)
        _leave_at_once(failure.user_error.exit_code if failure.user_error else 1)


def describe(failure: Failure, layout: LayoutConfig, log_dir: Path) -> str:
    """A failure in one line: rank, error, and the file with the full stack; of a user's error only the message."""
    if failure.user_error:
        return failure.message
    return f"{locate(failure.rank, layout)}: {failure.headline}; full stack: {log_path(log_dir, failure.rank)}"


def _leave_at_once(code: int) -> NoReturn:
    """End the process without cleaning up process groups, which would wait for ranks that may no longer answer."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
