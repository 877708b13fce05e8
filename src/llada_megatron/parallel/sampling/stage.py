"""The passes of a group on this rank's part of the model, and what they took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from llada_megatron.llada_moe.model.transformer import DiffusionTransformer
from llada_megatron.llada_moe.model.windows import KeyValues, Windows
from llada_megatron.llada_moe.sampling.loop import Method
from llada_megatron.llada_moe.sampling.passes import Pass
from llada_megatron.llada_moe.sampling.statistics import Reader, Statistics
from llada_megatron.parallel import device


@dataclass
class GenerationReport:
    """Counts of this rank's replica, and times of this rank; they add up over all that a writer writes."""

    passes: int = 0
    """Forward passes, over all groups."""
    idle_passes: int = 0
    """Those that ran only because replicas which share experts with this one had work."""
    positions_run: int = 0
    """Positions that passed through the layers, with blank twins and shadows."""
    rows_read: int = 0
    """Rows that met the output layer."""
    bytes_per_row: int = 0
    """The most that left this rank for one such row: its packet to the other vocabulary shards (counted where there is
    one shard too), and the row's statistics to the next pipeline stage."""
    seconds: float = 0.0
    """Of wall time, while there was something to write."""
    busy_seconds: float = 0.0
    """Of them, those in which this rank ran layers or read rows; what experts and tensor ranks wait for counts too."""

    @property
    def busy_share(self) -> float:
        """Share of the time in which this rank's stage was computing."""
        return self.busy_seconds / self.seconds if self.seconds else 0.0


class Stopwatch:
    """Adds up the time of pieces of work; on a GPU the time that they take there, without waiting for them."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside."""
        if device.cuda_available():
            began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            began.record()
            yield
            ended.record()
            self._events.append((began, ended))
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def take(self) -> float:
        """Seconds of the work that is over since the last call; work on a GPU may count in a later call."""
        seconds, self._seconds = self._seconds, 0.0
        while self._events and self._events[0][1].query():
            began, ended = self._events.pop(0)
            seconds += began.elapsed_time(ended) / 1000.0
        return seconds


class StageRunner:
    """One rank's part of the work on a group, and the keys and values that its layers keep for it."""

    def __init__(self, model: DiffusionTransformer, method: Method, slots: int, seq: int) -> None:
        """For a group of `slots` sequences of up to `seq` positions."""
        self._model = model
        self._seq = seq
        twins = 2 if method.reading.guidance else 1
        self.memory = KeyValues(slots * twins, seq) if method.cache.keeps else None
        shard = model.vocab_size // parallel_state.get_tensor_model_parallel_world_size()
        first_id = parallel_state.get_tensor_model_parallel_rank() * shard
        self.reader = Reader(method.reading, first_id, gather_over_tensor_ranks)

    @property
    def fields(self) -> int:
        """Numbers of a row's packed statistics."""
        return Statistics.width(self.reader.reading.needs)

    def unpacked(self, packed: torch.Tensor) -> Statistics:
        """Statistics of another rank's engine, from `[rows, fields]`."""
        return Statistics.unpacked(packed, self.reader.reading.needs)

    def forward(self, work: Pass, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """This stage's layers (collective over the tensor and expert ranks of the stage).

        Args:
            work: what runs.
            hidden: `[total, 1, hidden]` from the stage before; None on the first one.

        Returns:
            `[rows, vocab / tensor_parallel]` logits on the last stage, `[total, 1, hidden]` before it.
        """
        return self._forward(work, hidden, self.memory)

    def idle(self) -> None:
        """Run one token that nobody asks for, and keep nothing: other ranks need this one in their experts' exchange.

        Every stage makes up its own input.
        """
        hidden = None
        if not self._model.pre_process:
            config = self._model.config
            hidden = torch.zeros(1, 1, config.hidden_size, dtype=config.params_dtype, device=device.current())
        self._forward(Pass.idle(0), hidden, None)

    @torch.inference_mode()
    def read(self, work: Pass, logits: torch.Tensor) -> Statistics:
        """Statistics of the rows that the pass asks for (collective over the tensor ranks of the last stage)."""
        return self.reader.read(logits, work.rows)

    @torch.inference_mode()
    def _forward(self, work: Pass, hidden: torch.Tensor | None, memory: KeyValues | None) -> torch.Tensor:
        where = device.current()
        windows = Windows(work.windows, memory, work.positions.to(where), self._seq)
        if hidden is not None:
            self._model.set_input_tensor(hidden)
        return self._model(work.tokens[None].to(where), windows, rows=work.asked[None].to(where))


def gather_over_tensor_ranks(packet: torch.Tensor) -> torch.Tensor:
    """The packets of all vocabulary shards: `[rows, numbers]` -> `[shards, rows, numbers]` (collective)."""
    shards = parallel_state.get_tensor_model_parallel_world_size()
    if shards == 1 or packet.numel() == 0:  # a pass that asks for nothing asks for it on every shard
        return packet[None].expand(shards, *packet.shape)
    parts = torch.empty(shards, *packet.shape, dtype=packet.dtype, device=packet.device)
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_gather(list(parts.unbind(0)), packet.contiguous(), group=group)
    return parts
