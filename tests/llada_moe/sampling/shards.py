"""Several shards of the vocabulary in one process."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Barrier, Thread

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor, Reader, Statistics
from llada_megatron.llada_moe.sampling.token_buffer import LogitRows


class Shards:
    """One reader per shard, each in a thread of its own while it reads; packets meet at a barrier."""

    def __init__(self, processor: LogitsProcessor, sizes: Sequence[int]) -> None:
        self._sizes = list(sizes)
        self._barrier = Barrier(len(sizes), timeout=60)
        self._packets: list[Tensor] = [torch.empty(0)] * len(sizes)
        firsts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.readers = [Reader(processor, first, self._gather_of(i)) for i, first in enumerate(firsts)]

    def read(self, logits: Tensor, rows: LogitRows) -> list[Statistics]:
        """What each shard knows in the end, from logits `[rows, vocab]`."""
        results: list[Statistics | None] = [None] * len(self.readers)

        def work(i: int, shard: Tensor) -> None:
            try:
                results[i] = self.readers[i].read(shard, rows)
            except BaseException:
                self._barrier.abort()
                raise

        parts = logits.split(self._sizes, dim=1)
        threads = [Thread(target=work, args=(i, part)) for i, part in enumerate(parts)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [result for result in results if result is not None]

    def _gather_of(self, i: int):
        def gather(packet: Tensor) -> Tensor:
            self._packets[i] = packet
            self._barrier.wait()
            together = torch.stack(self._packets)
            self._barrier.wait()
            return together

        return gather


def make_rows(count: int, step: int = 0, current: Sequence[int] | None = None) -> LogitRows:
    """Rows of one sequence each."""
    numbers = torch.arange(count)
    return LogitRows(
        slot=numbers,
        position=numbers + 40,
        stream=numbers,
        step=torch.full_like(numbers, step),
        current=torch.zeros_like(numbers) if current is None else torch.tensor(current),
    )
