"""The batches of the next step, made in a thread while the device computes the present one.

A step of a large run reads 64 to 128 micro-batches on each rank; made when the step begins, they leave the device
without work for as long. What a step reads is a function of its number, so that nothing here needs to be saved: a run
that resumes, goes back, or leaves a step out asks for another number than the one that was made, and waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import Generic, TypeVar

_T = TypeVar("_T")
CLOSE_S = 10.0


class BatchesAhead(Generic[_T]):
    """`make(step)` for the steps of a run, each made while the one before it runs."""

    def __init__(self, make: Callable[[int], _T], steps: int) -> None:
        """`make` is a pure function, called in a thread; there is no step `steps`."""
        self._make, self._steps = make, steps
        self._present: tuple[int, _T] | None = None
        self._next: tuple[int, Future[_T]] | None = None
        self._thread: Thread | None = None

    def __call__(self, step: int) -> _T:
        """What `make` gives for `step`; then begins with the step after it.

        The present step's is kept: a step that is run again asks a second time.

        Raises:
            Exception: what `make` raised, here and not in the thread.
        """
        if self._present is None or self._present[0] != step:
            self._present = None
            self._present = step, self._result(step)
        if step + 1 < self._steps and (self._next is None or self._next[0] != step + 1):
            self._next = step + 1, self._begin(step + 1)
        return self._present[1]

    def _result(self, step: int) -> _T:
        ahead, self._next = self._next, None
        if ahead is not None and ahead[0] == step:
            return ahead[1].result()
        if ahead is not None:
            ahead[1].exception()  # of a step that nobody wants now: one thread at a time makes batches
        return self._make(step)

    def _begin(self, step: int) -> Future[_T]:
        future: Future[_T] = Future()

        def run() -> None:
            try:
                future.set_result(self._make(step))
            except BaseException as error:
                future.set_exception(error)

        # a daemon: a file system that does not answer must not keep a process that was told to end
        self._thread = Thread(target=run, name=f"batches of step {step}", daemon=True)
        self._thread.start()
        return future

    def close(self) -> None:
        """End the thread, which finishes what it is at; one that does not for `CLOSE_S` seconds is left to itself."""
        if self._thread is not None:
            self._thread.join(CLOSE_S)
