"""Runs the tasks of a conversion in threads, skips those done before, and shows how far it is."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from llada_megatron.console import message
from llada_megatron.tools.convert.workspace import Workspace

MOST_WORKERS = 8
_LINE_SECONDS = 30.0


class StoppedError(Exception):
    """Raised inside a task when another one failed or the user interrupted; never seen outside."""


class Progress:
    """Bytes done, told by tasks in several threads; `advance` is also where a task learns that it should stop."""

    def __init__(self, advance: Callable[[int], object]) -> None:
        self._advance = advance
        self._stop = threading.Event()

    def advance(self, count: int) -> None:
        """`count` more bytes are converted. Raises StoppedError."""
        if self._stop.is_set():
            raise StoppedError
        self._advance(count)

    def stop(self) -> None:
        """Make every task stop at its next unit."""
        self._stop.set()


@dataclass(frozen=True)
class Task:
    """A part of a conversion that is done as a whole or again."""

    number: int
    size: int
    """Bytes of tensors that it writes."""
    run: Callable[[Progress], Any]
    """Writes its files and returns a record of them (JSON values)."""


def default_workers() -> int:
    """Threads to use when the user does not say."""
    return min(MOST_WORKERS, len(os.sched_getaffinity(0)))


def run_tasks(workspace: Workspace, tasks: Sequence[Task], workers: int, title: str) -> list[Any]:
    """Run what is not done yet; returns every task's record, in order.

    Raises:
        ResourceError: the disk cannot hold what is missing.
        Any error of a task, once all have stopped; finished tasks stay done.
    """
    records = workspace.finished()
    open_tasks = [task for task in tasks if task.number not in records]
    if records:
        message(f"continuing an interrupted conversion: {len(records)} of {len(tasks)} parts are done")
    workspace.require_space(sum(task.size for task in open_tasks))
    with progress_bar(title, sum(task.size for task in tasks)) as show:
        show(sum(task.size for task in tasks if task.number in records))
        progress = Progress(show)
        pool = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="convert")

        def work(task: Task) -> None:
            records[task.number] = task.run(progress)
            workspace.finish(task.number, records[task.number])

        futures = [pool.submit(work, task) for task in open_tasks]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            progress.stop()
            pool.shutdown(cancel_futures=True)
        failures = [future.exception() for future in futures if not future.cancelled() and future.exception()]
        for failure in sorted(failures, key=lambda error: isinstance(error, StoppedError)):
            raise failure
    return [records[task.number] for task in tasks]


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr where that is a terminal, else a line now and then; yields what adds bytes to it."""
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
