"""Results on standard output, in the order of their prompts."""

from __future__ import annotations

from collections.abc import Sequence

from llada_megatron.console import emit_json
from llada_megatron.parallel.sampling.results import Result


class Printer:
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
