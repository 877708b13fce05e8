"""Sampling many sequences with a model that is spread over ranks.

Sequences run in groups, and the groups take turns to run a pass. While the statistics of one group come back from the
last pipeline stage, the stages work on the other groups; with as many groups as stages, no stage waits for a whole
round trip. Every rank of a replica keeps the state of all groups: it knows the pass to be run, and needs only the
statistics to know the next one.
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
from llada_megatron.llada_moe.sampling.speculation import SpeculativeGroup, group_of
from llada_megatron.llada_moe.sampling.statistics import Statistics
from llada_megatron.llada_moe.sampling.token_buffer import Request
from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
from llada_megatron.parallel.sampling.cuda_graphs import Recorder
from llada_megatron.parallel.sampling.not_finite import not_finite
from llada_megatron.parallel.sampling.pipeline_group import ExpectedMessage, PipelineGroup, Replicas, SentMessages
from llada_megatron.parallel.sampling.stage import GenerationReport, StageRunner, Stopwatch


@dataclass
class _InFlightMicrobatch:
    """A group of sequences and its pass that is in the pipeline."""

    group: SequenceGroup | SpeculativeGroup
    runner: StageRunner
    work: Pass | None = None
    """The pass; None = the group has no unfinished sequence."""
    statistics: Statistics | None = None
    """Statistics of the pass; on the last stage only."""
    arriving: ExpectedMessage | None = None
    """Statistics that another stage expects; None = the pass has no rows of logits."""
    sent: SentMessages = field(default_factory=SentMessages)


class SequenceGenerator:
    """Samples sequences with a loaded model by a method."""

    def __init__(
        self,
        loaded: LoadedModel,
        method: Method,
        batch_size: int,
        groups: int | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        """Collective over all ranks.

        Args:
            loaded: this rank's part of the model.
            method: the sampling method.
            batch_size: sequences of a group, which run in one pass.
            groups: groups in flight, each with a key-value cache of its own; None = one per pipeline stage.
            recorder: captures passes (`cuda_graphs.recorder_of`); None = every pass runs its layers from Python.

        Raises:
            ConfigError: the layout is one that sampling does not support.
        """
        config = loaded.model.config
        require_layout(config)
        self.report = GenerationReport()
        self._loaded, self._method, self._batch_size = loaded, method, batch_size
        self._recorder = recorder
        self._pipeline_group = PipelineGroup(config.hidden_size, config.params_dtype)
        self._replicas = Replicas(config.num_moe_experts is not None)
        self._groups = groups or self._pipeline_group.stages
        self._clock = Stopwatch()
        self._counted_at = 0.0

    def steps(self, requests: Iterable[Request]) -> Iterator[Step]:
        """Sample all requests, and yield what each pass changed.

        Collective: every rank of a replica must pass the same requests and consume all steps. Replicas have requests of
        their own; where replicas share experts, one that has finished its own keeps taking part for the others.

        Raises:
            ValueError: a request has no open position.
            CheckpointError: the model gives logits that are NaN or infinite.
        """
        requests = list(requests)
        waiting, in_flight, idle_turns = iter(requests), self._empty_groups(requests), 0
        self._counted_at = time.perf_counter()
        for microbatch in itertools.cycle(in_flight):
            if microbatch.work is not None:
                statistics = self._statistics(microbatch)
                if not statistics.finite:
                    raise not_finite(self._loaded)
                step = microbatch.group.apply(statistics)
                self._count_time()
                yield step
            for slot, request in zip(microbatch.group.free, waiting, strict=False):
                microbatch.group.admit(slot, request)
            microbatch.work = microbatch.group.plan()
            idle_turns = 0 if self._start(microbatch) else idle_turns + 1
            if idle_turns == len(in_flight):
                break
        for microbatch in in_flight:
            microbatch.sent.finish()
            if microbatch.runner.graphs is not None:
                self.report.graphs += microbatch.runner.graphs.counts
                microbatch.runner.graphs.leave()
        self._count_time()

    def _empty_groups(self, requests: list[Request]) -> list[_InFlightMicrobatch]:
        """Empty groups with room for the longest request. A small number of requests is spread over all groups."""
        slots = max(1, min(self._batch_size, -(-len(requests) // self._groups)))
        seq = max((len(request.tokens) for request in requests), default=1)
        blocks = max((len(request.blocks) for request in requests), default=1)
        model, mask_id = self._loaded.model, self._loaded.run.model.mask_token_id
        return [
            _InFlightMicrobatch(
                group_of(self._method, slots, seq, blocks, mask_id),
                StageRunner(model, self._method, slots, seq, self._recorder),
            )
            for _ in range(self._groups)
        ]

    def _start(self, microbatch: _InFlightMicrobatch) -> bool:
        """One turn of a group: its pass on this stage, or an idle pass while other replicas have work.

        Returns False if no replica has work.
        """
        if not self._replicas.any_has_work(microbatch.work is not None):
            return False
        if microbatch.work is not None:
            self._run(microbatch, microbatch.work)
        else:
            with self._clock.running():
                microbatch.runner.idle()
            self.report.idle_passes += 1
        return True

    def _run(self, microbatch: _InFlightMicrobatch, work: Pass) -> None:
        """Receive the hidden states of the previous stage, run this stage, and send the result on."""
        pipeline, runner, rows = self._pipeline_group, microbatch.runner, work.offsets.numel()
        hidden = None if pipeline.first else pipeline.receive_hidden(work.tokens.numel())
        with self._clock.running():
            output = runner.forward(work, hidden)
            microbatch.statistics = runner.read(work, output) if pipeline.last else None
        if not pipeline.last:
            pipeline.send_hidden(output, microbatch.sent)
            microbatch.arriving = pipeline.expect_statistics(rows, runner.fields) if rows else None
        elif pipeline.passes_on and rows:
            packed = microbatch.statistics.packed()
            microbatch.sent.finish()  # the hidden states that came prove that the earlier statistics were received
            pipeline.pass_on(packed, microbatch.sent)
            microbatch.statistics = runner.unpacked(packed)  # bitwise equal to those of the other stages
        self._count(work, runner)

    def _statistics(self, microbatch: _InFlightMicrobatch) -> Statistics:
        """The statistics of the pass in flight."""
        if microbatch.statistics is not None:
            return microbatch.statistics
        if microbatch.arriving is None:
            return microbatch.runner.unpacked(torch.empty(0, microbatch.runner.fields))
        packed = microbatch.arriving.wait()
        microbatch.sent.finish()  # the statistics prove that what this stage sent for the pass was received
        if self._pipeline_group.passes_on:
            self._pipeline_group.pass_on(packed, microbatch.sent)
        return microbatch.runner.unpacked(packed)

    def _count(self, work: Pass, runner: StageRunner) -> None:
        left = runner.reader.packet_bytes if self._pipeline_group.last else 0
        if self._pipeline_group.passes_on:
            left += torch.float32.itemsize * runner.fields
        self.report.passes += 1
        self.report.positions_run += work.tokens.numel()
        self.report.rows_read += work.offsets.numel()
        self.report.bytes_per_row = max(self.report.bytes_per_row, left)

    def _count_time(self) -> None:
        now = time.perf_counter()
        self.report.seconds += now - self._counted_at
        self.report.busy_seconds += self._clock.take()
        self._counted_at = now


def require_layout(config: TransformerConfig) -> None:
    """Refuse layouts that cannot run a pass over parts of sequences. Raises ConfigError."""
    refused = {
        "context_parallel": config.context_parallel_size > 1,
        "pipeline_chunks_per_rank": config.virtual_pipeline_model_parallel_size is not None,
        "sequence_parallel": config.sequence_parallel,
        "expert_dispatcher allgather": config.moe_token_dispatcher_type == "allgather"
        and config.num_moe_experts is not None,
    }
    for name, present in refused.items():
        if present:
            raise ConfigError(f"sampling does not run under layout.{name}; load the model without it")
