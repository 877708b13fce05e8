"""The passes of a group on this rank's part of the model, and counts and times of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from megatron.core import parallel_state

from llada_megatron.llada_moe.model.transfer import to_device
from llada_megatron.llada_moe.model.transformer import DiffusionTransformer
from llada_megatron.llada_moe.model.windows import KeyValues, Windows
from llada_megatron.llada_moe.sampling.loop import Method
from llada_megatron.llada_moe.sampling.passes import Pass
from llada_megatron.llada_moe.sampling.statistics import Reader, Statistics
from llada_megatron.parallel import device
from llada_megatron.parallel.sampling.cuda_graphs import GraphCounts, GraphedPasses, Recorder


@dataclass
class GenerationReport:
    """Counts of this rank's replica and times of this rank, summed over everything that a generator samples."""

    passes: int = 0
    """Forward passes of all groups."""
    idle_passes: int = 0
    """Passes that ran only because a replica which shares experts with this one had work."""
    positions_run: int = 0
    """Positions that passed through the layers, unconditional rows and shadows included."""
    rows_read: int = 0
    """Rows of logits that were computed."""
    bytes_per_row: int = 0
    """The most bytes that left this rank for one row of logits: its packet to the other vocabulary shards (counted
    also if there is one shard only), and its statistics to the next pipeline stage."""
    seconds: float = 0.0
    """Wall time while there was something to sample."""
    busy_seconds: float = 0.0
    """The part of `seconds` in which this rank ran layers or processed logits, waits for tensor-parallel and
    expert-parallel ranks included."""
    graphs: GraphCounts = field(default_factory=GraphCounts)
    """Passes that CUDA graphs replayed; all zero where there are none."""

    @property
    def busy_share(self) -> float:
        """Share of `seconds` in which this rank's stage was computing."""
        return self.busy_seconds / self.seconds if self.seconds else 0.0


class Stopwatch:
    """Sums the time of pieces of work; on a GPU the time that the GPU takes, without waiting for it."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the `with` block."""
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
        """Seconds of the work that ended since the last call; work on a GPU may be counted in a later call."""
        seconds, self._seconds = self._seconds, 0.0
        while self._events and self._events[0][1].query():
            began, ended = self._events.pop(0)
            seconds += began.elapsed_time(ended) / 1000.0
        return seconds


class StageRunner:
    """Runs the passes of one group on this rank's stage, and holds the key-value cache of its layers for the group."""

    def __init__(
        self, model: DiffusionTransformer, method: Method, slots: int, seq: int, recorder: Recorder | None = None
    ) -> None:
        """`slots` and `seq`: sequences of the group, and the most positions of one; `recorder`: captures passes."""
        self._model = model
        self._seq = seq
        rows_per_sequence = 2 if method.logits_processor.guidance else 1
        kept = slots * rows_per_sequence if method.cache.keeps else 0
        self.graphs = None if recorder is None else GraphedPasses.taken(recorder, model, kept, seq)
        own = KeyValues(kept, seq) if kept else None
        self.memory = own if self.graphs is None else self.graphs.memory
        shard = model.vocab_size // parallel_state.get_tensor_model_parallel_world_size()
        first_id = parallel_state.get_tensor_model_parallel_rank() * shard
        self.reader = Reader(method.logits_processor, first_id, gather_over_tensor_ranks)

    @property
    def fields(self) -> int:
        """How many numbers the packed statistics of a row have."""
        return Statistics.width(self.reader.processor.needs)

    def unpacked(self, packed: torch.Tensor) -> Statistics:
        """Statistics that another stage has packed, from `[rows, fields]`."""
        return Statistics.unpacked(packed, self.reader.processor.needs)

    def forward(self, work: Pass, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """This stage's layers (collective over the tensor and expert ranks of the stage).

        Args:
            work: the pass.
            hidden: hidden states `[total, 1, hidden]` of the previous stage; None on the first stage.

        Returns:
            logits `[rows, vocab / tensor_parallel]` on the last stage, hidden states `[total, 1, hidden]` on others.
        """
        graphed = None if self.graphs is None else self.graphs.run(work)
        return self._forward(work, hidden, self.memory) if graphed is None else graphed

    def idle(self) -> None:
        """Run one token and discard the result, because other ranks need this one in the exchange of expert inputs.

        Every stage makes its own input, so that stages exchange nothing.
        """
        hidden = None
        if not self._model.pre_process:
            config = self._model.config
            hidden = torch.zeros(1, 1, config.hidden_size, dtype=config.params_dtype, device=device.current())
        self._forward(Pass.idle(0), hidden, None)

    @torch.inference_mode()
    def read(self, work: Pass, logits: torch.Tensor) -> Statistics:
        """Statistics of the pass from its logits (collective over the tensor ranks of the last stage)."""
        return self.reader.read(logits, work.rows)

    @torch.inference_mode()
    def _forward(self, work: Pass, hidden: torch.Tensor | None, memory: KeyValues | None) -> torch.Tensor:
        own_device = device.current()
        windows = Windows(work.windows, memory, to_device(work.positions, own_device), self._seq)
        if hidden is not None:
            self._model.set_input_tensor(hidden)
        return self._model(to_device(work.tokens[None], own_device), windows, rows=work.output_mask[None])


def gather_over_tensor_ranks(packet: torch.Tensor) -> torch.Tensor:
    """The packets of all vocabulary shards: `[rows, numbers]` -> `[shards, rows, numbers]` (collective)."""
    shards = parallel_state.get_tensor_model_parallel_world_size()
    if shards == 1 or packet.numel() == 0:  # a pass without rows of logits has none on every shard
        return packet[None].expand(shards, *packet.shape)
    parts = torch.empty(shards, *packet.shape, dtype=packet.dtype, device=packet.device)
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_gather(list(parts.unbind(0)), packet.contiguous(), group=group)
    return parts
