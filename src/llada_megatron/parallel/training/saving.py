"""When a run's checkpoints are written, what they cost, what a failed one does, and their copies. Collective."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.errors import CheckpointError, ResourceError
from llada_megatron.parallel.checkpoint.copies import Copies
from llada_megatron.parallel.checkpoint.retention import Retention
from llada_megatron.parallel.checkpoint.store import CheckpointStore
from llada_megatron.parallel.training.reporter import Reporter
from llada_megatron.parallel.training.state import RunState

SECONDS_LOST = "checkpoint/seconds_lost"
"""Metric: time that a checkpoint took from training, in seconds: planning, staging, completing, and a synchronous
save's writing. What a background write costs the steps beside it is not in it."""


def open_store(run: RunConfig) -> CheckpointStore:
    """The checkpoints of `run` (collective)."""
    settings = run.checkpoint
    return CheckpointStore(
        Path(run.output_dir) / "checkpoints",
        settings.keep_last,
        settings.asynchronous,
        keep_every=settings.keep_every,
        copies=settings.copy_to,
    )


def _pause_text(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds:.2f} s"


class Saver:
    """The saves of one run. A failed one is reported, and tried again at the next interval."""

    def __init__(
        self, run: RunConfig, store: CheckpointStore, reporter: Reporter, resumed: Path | None, step: int
    ) -> None:
        """`resumed`: the step directory that the run goes on from, if any, at `step`."""
        self._settings, self._store, self._reporter = run.checkpoint, store, reporter
        self.saved_step = step
        """Steps done in the state that was saved, or gone on from, last."""
        self.saved_path = resumed if resumed is not None and resumed.parent == store.directory else None
        """The step directory that was saved, or gone on from, last; None where it is not one of the run's own."""
        self._saving = step
        self._seconds = 0.0
        self._failures = 0
        self._copies = self._open_copies()
        if self._copies is not None and resumed is not None:
            self._copies.catch_up(resumed)
            self._protect_copied()

    def save(self, state: RunState) -> None:
        """Write a checkpoint of this step; a failure is reported.

        Raises:
            ResourceError: it was the last of `checkpoint.max_failures` in a row.
        """
        self._tolerate(self._finish_pending)
        self._reporter.interval()  # a line of metrics must not be missing after a resume
        self._tolerate(lambda: self._write(state))

    def poll(self) -> None:
        """Complete a save, or a copy, that was written in the background. Call it between steps.

        Raises:
            ResourceError: as `save`.
        """
        if self._store.busy:
            self._tolerate(self._poll_pending)
        if self._copies is not None:
            self._copies.poll()
            self._protect_copied()

    def finish(self) -> None:
        """Wait for a save that is being written; a failure is reported.

        Raises:
            ResourceError: as `save`.
        """
        self._tolerate(self._finish_pending)

    def went_back(self, step: int) -> None:
        """The run goes on from the checkpoint of `step`, which may be older than the newest."""
        self.saved_step, self.saved_path = step, None

    def forget(self) -> None:
        """What was saved is lost, and is to be saved again."""
        self.saved_step, self.saved_path = -1, None

    def end(self, state: RunState, stop: Callable[[], bool]) -> None:
        """Save what is not saved yet, and let copies come to their end unless this rank's `stop`, or another's, is set.

        A run that is asked to stop has no time for them: the next start makes them.

        Raises:
            ResourceError, CheckpointError: the last checkpoint could not be written.
        """
        self.finish()
        if state.step != self.saved_step:
            self._reporter.interval()
            self._write(state)
            self._finish_pending()
        if self._copies is not None:
            self._copies.finish(stop)

    def _write(self, state: RunState) -> None:
        self._saving, self._seconds = state.step, 0.0
        self._timed(lambda: state.save(self._store))
        if not self._store.busy:
            self._completed(self._store.directory_of(state.step))

    def _poll_pending(self) -> None:
        path = self._timed(self._store.poll)
        if path is not None:
            self._completed(path)

    def _finish_pending(self) -> None:
        path = self._timed(self._store.finish)
        if path is not None:
            self._completed(path)

    def _timed(self, action: Callable[[], Path | None]) -> Path | None:
        began = time.perf_counter()
        try:
            with self._reporter.untimed():
                return action()
        finally:
            self._seconds += time.perf_counter() - began

    def _completed(self, path: Path) -> None:
        self.saved_step, self.saved_path, self._failures = self._saving, path, 0
        self._reporter.note(SECONDS_LOST, self._seconds)
        self._reporter.message(f"saved step {self._saving}, training paused {_pause_text(self._seconds)}")
        if self._copies is not None:
            self._copies.add(path)
            self._protect_copied()

    def _tolerate(self, action: Callable[[], None]) -> None:
        try:
            action()
        except (ResourceError, CheckpointError) as error:
            self._failures += 1
            allowed = self._settings.max_failures
            if self._failures >= allowed:
                raise ResourceError(
                    f"{self._failures} checkpoints in a row could not be saved (checkpoint.max_failures), the last of "
                    f"step {self._saving}: {error}. The run ends here; make room and run the same command again to go "
                    "on from the newest whole one"
                ) from error
            self._reporter.warning(
                f"no checkpoint of step {self._saving} ({error}). Training goes on and saves again at the next "
                f"interval; failure {self._failures} of {allowed} in a row that end the run"
            )

    def _open_copies(self) -> Copies | None:
        settings = self._settings
        if settings.copy_to is None:
            return None
        retention = Retention(Path(settings.copy_to).absolute(), settings.keep_last, settings.keep_every)
        return Copies(retention, self._reporter.message)

    def _protect_copied(self) -> None:
        """What is being copied must not be removed."""
        self._store.protected = self._copies.protected if self._copies is not None else ()
