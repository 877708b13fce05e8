"""What sampling prints: results in the order of their prompts, and the progress of a batch."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from llada_megatron.console import emit_json
from llada_megatron.launch.sampling.batch_output import part_paths, records
from llada_megatron.parallel.sampling.results import Result
from llada_megatron.parallel.training.progress import format_seconds


class ResultPrinter:
    """Prints results in the order of their prompts, each as soon as all earlier ones are printed."""

    def __init__(self, quiet: bool, jsonl: bool, numbers: Sequence[int]) -> None:
        """`quiet`: print nothing; `jsonl`: print lines of JSON; `numbers`: numbers of the prompts, in their order."""
        self._quiet, self._jsonl = quiet, jsonl
        self._waiting, self._several = list(numbers), len(numbers) > 1
        self._held: dict[int, Result] = {}
        self.results: list[Result] = []
        """Results that were printed."""

    def expect(self, numbers: Sequence[int]) -> None:
        """Expect results of these prompts only."""
        self._waiting = list(numbers)

    def take(self, result: Result) -> None:
        """Take a result, in any order."""
        self._held[result.number] = result
        while self._waiting and self._waiting[0] in self._held:
            self._print(self._held.pop(self._waiting.pop(0)))

    def finish(self) -> None:
        """Print the results that still wait for a prompt without a result."""
        for number in sorted(self._held):
            self._print(self._held.pop(number))

    def _print(self, result: Result) -> None:
        self.results.append(result)
        if self._quiet:
            return
        if self._jsonl:
            emit_json(result.record())
            return
        text = " ".join(map(str, result.tokens)) if result.text is None else result.text
        print(f"==> {result.number} <==\n{text}" if self._several else text, flush=True)


_LINE_SECONDS, _TERMINAL_SECONDS = 5.0, 0.5


@dataclass
class PromptCounts:
    """Sums over the results of finished prompts."""

    prompts: int = 0
    new_tokens: int = 0
    forwards: int = 0
    positions: int = 0

    def add(self, record: dict[str, Any]) -> None:
        """Add a result."""
        self.prompts += 1
        self.new_tokens += record["new_tokens"]
        self.forwards += record["forwards"]
        self.positions += record["positions"]

    @property
    def tokens_per_forward(self) -> float:
        """Sampled tokens per forward pass of a sequence."""
        return self.new_tokens / max(1, self.forwards)

    @property
    def positions_per_token(self) -> float:
        """Positions that were run per sampled token."""
        return self.positions / max(1, self.new_tokens)


@dataclass
class BatchProgress:
    """Counts the results that all replicas append to the part files from now on."""

    base: Path
    counts: PromptCounts = field(default_factory=PromptCounts)

    def __post_init__(self) -> None:
        self._offsets = {path: path.stat().st_size for path in part_paths(self.base)}
        self.began = time.perf_counter()

    def update(self) -> PromptCounts:
        """Read the results that were appended since the last call; returns all counts."""
        for path in part_paths(self.base):
            for record, end in records(path, self._offsets.get(path, 0)):
                self.counts.add(record)
                self._offsets[path] = end
        return self.counts

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began


class ProgressLine:
    """Shows the progress of a batch: one line that is overwritten on a terminal, a line every few seconds elsewhere."""

    def __init__(self, progress: BatchProgress, before: int, total: int, stream: TextIO | None = None) -> None:
        """`before`: prompts that were finished before this run; `total`: prompts that are finished at its end."""
        self._progress, self._before, self._total = progress, before, total
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._last = time.perf_counter()

    def show(self, last: bool = False) -> None:
        """Show the progress, unless it was shown only recently; `last`: show it in any case, and end the line."""
        now = time.perf_counter()
        if not last and now - self._last < (_TERMINAL_SECONDS if self._live else _LINE_SECONDS):
            return
        self._last = now
        text = self.text()
        if self._live:
            print(f"\r\x1b[K{text}", end="\n" if last else "", file=self._stream, flush=True)
        else:
            print(text, file=self._stream, flush=True)

    def text(self) -> str:
        """The line, such as `120/5,000 prompts  310 tokens/s  4.20 tokens per forward  12:03 left`."""
        counts, seconds = self._progress.update(), self._progress.seconds
        done = self._before + counts.prompts
        parts = [f"{done:,}/{self._total:,} prompts", f"{counts.new_tokens / max(seconds, 1e-9):,.0f} tokens/s"]
        parts.append(f"{counts.tokens_per_forward:.2f} tokens per forward")
        if counts.prompts and done < self._total:
            parts.append(f"{format_seconds(seconds / counts.prompts * (self._total - done))} left")
        return "  ".join(parts)
