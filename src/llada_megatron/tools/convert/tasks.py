"""The tasks of a conversion, run in threads: progress, interruption, and the limit on open files."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from llada_megatron.console import message
from llada_megatron.parallel.machine import raise_open_files
from llada_megatron.tools.convert.workspace import Workspace

_OTHERS = 64  # open files of libraries, streams and the journal


def workers_for_files(workers: int, files_each: int, files: int) -> int:
    """How many of `workers` threads can run, after the limit on open files was raised as far as needed and allowed.

    Args:
        files_each: number of files that one thread writes at a time.
        files: number of files that are open for all threads together.
    """
    fixed = files + _OTHERS
    wanted = fixed + workers * files_each
    limit = raise_open_files(wanted)
    if limit is None or limit >= wanted:
        return workers
    fewer = max(1, (limit - fixed) // files_each)
    message(
        f"{fewer} workers instead of {workers}: each may write {files_each} files at a time, and this process "
        f"may open {limit} (raise the hard limit, `ulimit -Hn`, for more)"
    )
    return min(fewer, workers)


MOST_WORKERS = 8

_LINE_SECONDS = 30.0


class StoppedError(Exception):
    """Raised inside a task when another one failed or the user interrupted; `run_tasks` raises the cause instead."""


class ByteProgress:
    """Counts the bytes that the tasks have done in their threads, and stops a task when it counts."""

    def __init__(self, advance: Callable[[int], object]) -> None:
        self._advance = advance
        self._stop = threading.Event()

    def advance(self, count: int) -> None:
        """Count `count` more bytes. Raises StoppedError: the task must stop."""
        if self._stop.is_set():
            raise StoppedError
        self._advance(count)

    def stop(self) -> None:
        """Make every task stop when it next counts bytes."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """Whether the tasks have been told to stop."""
        return self._stop.is_set()


@dataclass(frozen=True)
class TaskResult:
    """What a finished task leaves."""

    record: Any = None
    """JSON values that `run_tasks` returns, now or after an interruption."""
    files: tuple[Path, ...] = ()
    """The files that it wrote, whose contents the storage holds."""


@dataclass(frozen=True)
class Task:
    """A part of a conversion, which is repeated as a whole if it is interrupted. It counts its bytes of both kinds."""

    number: int
    run: Callable[[ByteProgress], TaskResult]
    writes: int = 0
    """Bytes of tensors that it writes."""
    reads: int = 0
    """Bytes that it reads without writing them."""

    @property
    def size(self) -> int:
        """Bytes of both kinds, its share of the work."""
        return self.writes + self.reads


def default_workers() -> int:
    """The number of threads if the user gives none."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def run_tasks(workspace: Workspace, tasks: Sequence[Task], workers: int, title: str) -> list[Any]:
    """Run the tasks that are not done yet, and return the records of all, in order.

    Raises:
        ResourceError: the disk cannot hold what is still to be written.
        KeyboardInterrupt, or any error of a task: after all threads have ended; finished tasks are not run again.
    """
    records = workspace.resume()
    open_tasks = [task for task in tasks if task.number not in records]
    if records:
        message(f"continuing an interrupted conversion: {len(records)} of {len(tasks)} parts are done")
    workspace.require_space(sum(task.writes for task in open_tasks))
    with progress_bar(title, sum(task.size for task in tasks)) as show:
        show(sum(task.size for task in tasks if task.number in records))

        def work(task: Task, progress: ByteProgress) -> None:
            progress.advance(0)  # so that a task that waited is not begun after a failure
            result = task.run(progress)
            workspace.finish(task.number, result.record, result.files)
            records[task.number] = result.record

        failures = _run(work, open_tasks, workers, ByteProgress(show))
    for failure in sorted(failures, key=lambda error: isinstance(error, StoppedError)):
        raise failure
    return [records[task.number] for task in tasks]


def _run(
    work: Callable[[Task, ByteProgress], None], tasks: Sequence[Task], workers: int, progress: ByteProgress
) -> list[BaseException]:
    """Run the tasks in threads until all are done or one fails; returns the errors of those that failed."""
    pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="convert")
    with _postponed_interrupt(progress):
        try:
            futures = [pool.submit(work, task, progress) for task in tasks]
            if wait(futures, return_when=FIRST_EXCEPTION).not_done and not progress.stopping:
                message("stopping …")
        finally:
            progress.stop()
            pool.shutdown(cancel_futures=True)
    return [failure for future in futures if not future.cancelled() and (failure := future.exception())]


@contextlib.contextmanager
def _postponed_interrupt(progress: ByteProgress) -> Iterator[None]:
    """Ctrl-C stops the tasks, and is raised when they have stopped: until then they use the files and the lock."""
    seen = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen = True
        progress.stop()
        message("stopping …")

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        raise KeyboardInterrupt


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr if that is a terminal, else a line now and then; yields a function that adds bytes."""
    if not sys.stderr.isatty():
        yield _lines(title, total)
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True)) as bar:
        row = bar.add_task(title, total=total)
        yield lambda count: bar.advance(row, count)


def _lines(title: str, total: int) -> Callable[[int], None]:
    lock = threading.Lock()
    done, shown = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, shown
        with lock:
            done += count
            if time.monotonic() - shown > _LINE_SECONDS:
                shown = time.monotonic()
                message(f"{title}: {done / 1e9:.1f} of {total / 1e9:.1f} GB")

    return advance
