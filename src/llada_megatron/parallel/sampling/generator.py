"""Writing many sequences with a model that is spread over ranks.

Sequences are written in groups. One group after the other runs a pass (a turn), so that while the statistics of one
group come back from the last pipeline stage, the stages work on the others: with as many groups as stages none waits
for a whole round trip. Every rank of a replica keeps the same control of all groups: it knows what is to be run, and
needs nothing but the statistics to know what comes next.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.sampling.loop import Method, SequenceGroup, Step
from llada_megatron.llada_moe.sampling.passes import Pass
from llada_megatron.llada_moe.sampling.statistics import Statistics
from llada_megatron.llada_moe.sampling.token_buffer import Request
from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
from llada_megatron.parallel.sampling.pipeline_group import ExpectedMessage, PipelineGroup, Replicas, SentMessages
from llada_megatron.parallel.sampling.stage import GenerationReport, StageRunner, Stopwatch


@dataclass
class _InFlightMicrobatch:
    """A group, and its pass that is somewhere in the pipeline."""

    group: SequenceGroup
    engine: StageRunner
    work: Pass | None = None
    """None = no pass is under way."""
    statistics: Statistics | None = None
    """Of the pass, on the last stage."""
    arriving: ExpectedMessage | None = None
    """Those on their way to another stage; None = the pass asks for nothing."""
    sent: SentMessages = field(default_factory=SentMessages)


class SequenceGenerator:
    """Writes drafts with a loaded model by a method."""

    def __init__(self, loaded: LoadedModel, method: Method, batch_size: int, groups: int | None = None) -> None:
        """Collective over all ranks.

        Args:
            loaded: this rank's part of the model.
            method: how to write.
            batch_size: sequences of a group: those that run in one pass.
            groups: groups in flight, each with kept keys and values of its own; None = one per pipeline stage.

        Raises:
            ConfigError: a layout that sampling does not run under.
        """
        config = loaded.model.config
        _require_layout(config)
        self.report = GenerationReport()
        self._loaded, self._method, self._batch_size = loaded, method, batch_size
        self._column = PipelineGroup(config.hidden_size, config.params_dtype)
        self._replicas = Replicas(config.num_moe_experts is not None)
        self._groups = groups or self._column.stages
        self._clock = Stopwatch()
        self._counted_at = 0.0

    def steps(self, drafts: Iterable[Request]) -> Iterator[Step]:
        """Write all drafts, and yield what each pass changed.

        Every rank of a replica gives the same drafts, and takes all steps or, with the others, none. Replicas have
        drafts of their own; where they share experts, one that has written its own waits for the others.

        Raises:
            ValueError: a draft without a gap.
        """
        drafts = list(drafts)
        waiting, flights, quiet = iter(drafts), self._flights(drafts), 0
        self._counted_at = time.perf_counter()
        for flight in itertools.cycle(flights):
            if flight.work is not None:
                step = flight.group.apply(self._statistics(flight))
                self._count_time()
                yield step
            for slot, draft in zip(flight.group.free, waiting, strict=False):
                flight.group.admit(slot, draft)
            flight.work = flight.group.plan()
            quiet = 0 if self._start(flight) else quiet + 1
            if quiet == len(flights):
                break
        for flight in flights:
            flight.sent.finish()
        self._count_time()

    def _flights(self, drafts: list[Request]) -> list[_InFlightMicrobatch]:
        """Empty groups with room for the longest draft; few drafts are shared out over all groups."""
        slots = max(1, min(self._batch_size, -(-len(drafts) // self._groups)))
        seq = max((len(draft.tokens) for draft in drafts), default=1)
        blocks = max((len(draft.blocks) for draft in drafts), default=1)
        model, mask_id = self._loaded.model, self._loaded.run.model.mask_token_id
        return [
            _InFlightMicrobatch(
                SequenceGroup(self._method, slots, seq, blocks, mask_id), StageRunner(model, self._method, slots, seq)
            )
            for _ in range(self._groups)
        ]

    def _start(self, flight: _InFlightMicrobatch) -> bool:
        """A turn of a group: its pass on this stage, or that of other replicas; False if nobody has one."""
        if not self._replicas.any_works(flight.work is not None):
            return False
        if flight.work is not None:
            self._run(flight, flight.work)
        else:
            with self._clock.running():
                flight.engine.idle()
            self.report.idle_passes += 1
        return True

    def _run(self, flight: _InFlightMicrobatch, work: Pass) -> None:
        """Take the hidden states of the stage before, run, and send on."""
        column, engine, rows = self._column, flight.engine, work.place.numel()
        hidden = None if column.first else column.receive_hidden(work.tokens.numel())
        with self._clock.running():
            output = engine.forward(work, hidden)
            flight.statistics = engine.read(work, output) if column.last else None
        if not column.last:
            column.send_hidden(output, flight.sent)
            flight.arriving = column.expect_statistics(rows, engine.fields) if rows else None
        elif column.passes_on and rows:
            packed = flight.statistics.packed()
            flight.sent.finish()  # the hidden states that came tell that the statistics before them were taken
            column.pass_on(packed, flight.sent)
            flight.statistics = engine.unpacked(packed)  # to the bit what the others have
        self._count(work, engine)

    def _statistics(self, flight: _InFlightMicrobatch) -> Statistics:
        """What came of the pass under way."""
        if flight.statistics is not None:
            return flight.statistics
        if flight.arriving is None:
            return flight.engine.unpacked(torch.empty(0, flight.engine.fields))
        packed = flight.arriving.wait()
        flight.sent.finish()  # they tell that what this stage sent for the pass was taken
        if self._column.passes_on:
            self._column.pass_on(packed, flight.sent)
        return flight.engine.unpacked(packed)

    def _count(self, work: Pass, engine: StageRunner) -> None:
        left = engine.reader.packet_bytes if self._column.last else 0
        if self._column.passes_on:
            left += torch.float32.itemsize * engine.fields
        self.report.passes += 1
        self.report.positions_run += work.tokens.numel()
        self.report.rows_read += work.place.numel()
        self.report.bytes_per_row = max(self.report.bytes_per_row, left)

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.report.seconds += now - self._counted_at
        self.report.busy_seconds += self._clock.take()
        self._counted_at = now


def _require_layout(config: TransformerConfig) -> None:
    """Refuse what a pass over parts of sequences is not made for."""
    refused = {
        "context_parallel": config.context_parallel_size > 1,
        "pipeline_chunks_per_rank": config.virtual_pipeline_model_parallel_size is not None,
        "sequence_parallel": config.sequence_parallel,
        "expert_dispatcher allgather": config.moe_token_dispatcher_type == "allgather"
        and config.num_moe_experts is not None,
    }
    for name, there in refused.items():
        if there:
            raise ConfigError(f"sampling does not run under layout.{name}; load the model without it")
