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
    """Prints each result as soon as those before it are printed: lines of JSON, or the texts themselves."""

    def __init__(self, quiet: bool, jsonl: bool, numbers: Sequence[int]) -> None:
        """`quiet`: print nothing; `numbers`: of the prompts, in their order."""
        self._quiet, self._jsonl = quiet, jsonl
        self._waiting, self._several = list(numbers), len(numbers) > 1
        self._held: dict[int, Result] = {}
        self.results: list[Result] = []
        """Those that were printed."""

    def expect(self, numbers: Sequence[int]) -> None:
        """There will be results of these only."""
        self._waiting = list(numbers)

    def take(self, result: Result) -> None:
        """One more, in any order."""
        self._held[result.number] = result
        while self._waiting and self._waiting[0] in self._held:
            self._print(self._held.pop(self._waiting.pop(0)))

    def finish(self) -> None:
        """Print what waited for a prompt that was not written."""
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
    """Sums over finished prompts."""

    prompts: int = 0
    new_tokens: int = 0
    forwards: int = 0
    positions: int = 0

    def add(self, record: dict[str, Any]) -> None:
        """One more."""
        self.prompts += 1
        self.new_tokens += record["new_tokens"]
        self.forwards += record["forwards"]
        self.positions += record["positions"]

    @property
    def tokens_per_forward(self) -> float:
        """Written tokens per forward pass of a sequence."""
        return self.new_tokens / max(1, self.forwards)

    @property
    def positions_per_token(self) -> float:
        """Positions that were run per written token."""
        return self.positions / max(1, self.new_tokens)


@dataclass
class BatchProgress:
    """What comes to the parts from now on."""

    base: Path
    counts: PromptCounts = field(default_factory=PromptCounts)

    def __post_init__(self) -> None:
        self._offsets = {path: path.stat().st_size for path in part_paths(self.base)}
        self.began = time.perf_counter()

    def update(self) -> PromptCounts:
        """Read what came since the last call."""
        for path in part_paths(self.base):
            for record, behind in records(path, self._offsets.get(path, 0)):
                self.counts.add(record)
                self._offsets[path] = behind
        return self.counts

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self.began


class ProgressLine:
    """Says how far a batch is: a line that is written over on a terminal, one every few seconds elsewhere."""

    def __init__(self, tally: BatchProgress, before: int, total: int, stream: TextIO | None = None) -> None:
        """`before`: prompts that were finished before this run; `total`: those that will be at its end."""
        self._tally, self._before, self._total = tally, before, total
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty()
        self._last = time.perf_counter()

    def show(self, last: bool = False) -> None:
        """Perhaps say it: not too often, but for the last time."""
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
        """`120/5000 prompts  310 tokens/s  4.2 tokens per forward  12:03 left`."""
        counts, seconds = self._tally.update(), self._tally.seconds
        done = self._before + counts.prompts
        parts = [f"{done:,}/{self._total:,} prompts", f"{counts.new_tokens / max(seconds, 1e-9):,.0f} tokens/s"]
        parts.append(f"{counts.tokens_per_forward:.2f} tokens per forward")
        if counts.prompts and done < self._total:
            parts.append(f"{format_seconds(seconds / counts.prompts * (self._total - done))} left")
        return "  ".join(parts)
