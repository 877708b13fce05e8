"""The progress of a run on stderr: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bar


class TrainingProgress:
    """Shows step, loss, tokens/s, utilisation and the time left. Only rank 0 shows anything.

    On a terminal a live bar (NO_COLOR takes the colours away); otherwise a plain line per update, none closer than
    `line_seconds` to the one before, and always one for the last step.
    """

    def __init__(
        self, total: int, start: int = 0, *, rank: int = 0, stream: TextIO | None = None, line_seconds: float = 5.0
    ) -> None:
        self._total, self._start, self._step = total, start, start
        self._line_seconds, self._last_line = line_seconds, float("-inf")
        self._began = time.perf_counter()
        self._console = Console(file=stream, stderr=stream is None, highlight=False, quiet=rank != 0, soft_wrap=True)
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        if rank == 0 and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = _live_bar(self._console)
            self._task = self._bar.add_task("step", total=total, completed=start, facts="")

    def __enter__(self) -> TrainingProgress:
        self._began = time.perf_counter()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(
        self,
        step: int,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        utilization: str | None = None,
    ) -> None:
        """Shows that `step` steps are done; `utilization` in words, such as `41% of 134 GFLOP/s fp32`."""
        self._step = step
        facts = self._facts(loss, tokens_per_second, utilization)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, facts=facts)
            return
        now = time.perf_counter()
        if step >= self._total or now - self._last_line >= self._line_seconds:
            self._last_line = now
            self.message(f"step {step}/{self._total}  {facts}")

    def message(self, text: str) -> None:
        """Prints a line (above the bar)."""
        self._console.print(text, markup=False)

    def seconds_left(self) -> float | None:
        """Time to the last step at this process's average pace; None before its first step."""
        done = self._step - self._start
        if done <= 0:
            return None
        return (time.perf_counter() - self._began) / done * (self._total - self._step)

    def _facts(self, loss: float | None, tokens_per_second: float | None, utilization: str | None) -> str:
        facts = []
        if loss is not None:
            facts.append(f"loss {loss:.4f}")
        if tokens_per_second is not None:
            facts.append(f"{tokens_per_second:,.0f} tokens/s")
        if utilization is not None:
            facts.append(utilization)
        left = self.seconds_left()
        if left is not None:
            facts.append(f"{format_seconds(left)} left")
        return "  ".join(facts)


def _live_bar(console: Console) -> Bar:
    columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    return Bar(*columns, TextColumn("{task.fields[facts]}"), console=console, refresh_per_second=4)


def format_seconds(seconds: float) -> str:
    """A duration as h:mm:ss, or m:ss under an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
