"""What a run says of itself: a line of metrics for every step, figures and progress every interval, on rank 0."""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from llada_megatron.console import rate_text
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.data.batch import Batch, Samples
from llada_megatron.llada_moe.evaluation.likelihood import Likelihood
from llada_megatron.llada_moe.model.context_slices import busiest_over_mean
from llada_megatron.llada_moe.model.flops import FORMULA, flops_per_token
from llada_megatron.llada_moe.model.patterns import CAUSAL, AttentionPattern
from llada_megatron.llada_moe.objectives import Objective
from llada_megatron.parallel import device, host_group
from llada_megatron.parallel.collectives import on_rank_0
from llada_megatron.parallel.training.callbacks import Callbacks
from llada_megatron.parallel.training.experts.expert_monitor import ExpertMonitor
from llada_megatron.parallel.training.experts.expert_reading import ExpertReading
from llada_megatron.parallel.training.metrics import MaskRatioLoss, Throughput
from llada_megatron.parallel.training.metrics_writer import MetricsWriter
from llada_megatron.parallel.training.peak import (
    PRECISION_NAMES,
    has_product,
    matmul_peak,
    peak_memory_gb,
    product_types,
)
from llada_megatron.parallel.training.progress import TrainingProgress
from llada_megatron.parallel.training.recovery.attempt import StepAttempt


class Reporter:
    """Collects what the steps return, and every `logging.interval` steps reduces it over the ranks and writes it down.

    Between intervals it reduces nothing.
    """

    def __init__(
        self, run: RunConfig, objective: Objective, models: list[torch.nn.Module], data: Samples, first_step: int
    ) -> None:
        self.run, self.objective, self.data, self._first_step = run, objective, data, first_step
        self.rank = torch.distributed.get_rank()
        directory = Path(run.output_dir)
        moe = run.model.moe is not None
        self.writer = MetricsWriter(directory, run.logging.tensorboard, first_step + 1, moe) if self.rank == 0 else None
        self.callbacks = Callbacks(run)
        self.progress = TrainingProgress(run.training.steps, first_step, rank=self.rank)
        self.expert_load = ExpertMonitor(run, models)
        self.by_ratio = MaskRatioLoss(device=device.current())
        self.throughput: Throughput | None = None
        self._lengths: list[int] = []
        self._works: dict[AttentionPattern, float] = {}
        self._peak_flops: float | None = None
        self._peak_precision = ""
        self.last_loss = float("nan")
        self._waiting: list[tuple[int, dict[str, float]]] = []
        self._notes: dict[str, float] = {}

    def start(self, batches: list[Batch]) -> None:
        """Tell the callbacks, and count the work per token, from the first step's batches (collective).

        Raises:
            ResourceError: a callback cannot start.
        """
        on_rank_0(lambda: self.callbacks.start(self._first_step))
        self._lengths = torch.cat([batch.boundaries.diff() for batch in batches]).tolist()
        pattern = self.objective.pattern(self._first_step)
        work = self._work(pattern)
        if self.run.layout.context_parallel > 1:
            lengths = np.array(self._lengths)
            self.message(context_balance(lengths, batches[0].inputs.size(1), self.run.layout.context_parallel, pattern))
        self.throughput = Throughput(work)
        logging.getLogger(__name__).info("model FLOPs per token %.4g; %s", work, FORMULA)

    def _measured_peak(self, throughput: Throughput) -> float:
        """FLOP/s of all ranks, measured by all at once when the first utilisation is computed (collective)."""
        if self._peak_flops is None:
            with throughput.paused():
                dtype = self._product_type()
                own = matmul_peak(device.current(), dtype)
                peak = torch.tensor(own, dtype=torch.float64, device=device.current())
                torch.distributed.all_reduce(peak)
                self._peak_flops, self._peak_precision = float(peak), PRECISION_NAMES[dtype]
            text = "measured peak %.4g FLOP/s in %s over all ranks"
            logging.getLogger(__name__).info(text, self._peak_flops, self._peak_precision)
        return self._peak_flops

    def _product_type(self) -> torch.dtype:
        """The first type of the run's products that all ranks can measure (collective)."""
        *preferred, last = product_types(self.run.training)
        for dtype in preferred:
            lacking = torch.tensor(not has_product(device.current(), dtype), dtype=torch.int32, device=device.current())
            torch.distributed.all_reduce(lacking)
            if not lacking:
                return dtype
        return last

    def _work(self, pattern: AttentionPattern) -> float:
        """FLOPs of a token in a step of this pattern, with documents as in the first step (collective when new)."""
        if pattern not in self._works:
            # of a run that goes on to masks, a causal step learns each next token
            next_tokens = pattern == CAUSAL != self.objective.pattern(self.run.training.steps - 1)
            self._works[pattern] = flops_per_token(
                self.run.model,
                self.run.training.sequence_length,
                keys_per_query=self._keys_per_query(pattern),
                supervised_share=1.0 if next_tokens else self.objective.supervised_share,
                copies=pattern.copies,
                frozen=self.run.training.lora is not None,
            ).total
        return self._works[pattern]

    def _keys_per_query(self, pattern: AttentionPattern) -> float:
        """Keys that a token sees on average, in the segments of the first step's batches."""
        seen = sum(length * pattern.keys_per_query(length) for length in self._lengths if length)
        sums = torch.tensor([seen, sum(self._lengths)], dtype=torch.float64)
        host_group.data_parallel().all_reduce(sums)
        return float(sums[0] / sums[1])

    def step(self, number: int, attempt: StepAttempt | None, rate: float, decisions: int = 0) -> None:
        """Take note of step `number` (from 1), which ran at learning rate `rate`, or was left out (`attempt` None).

        `decisions`: those of the recovery policy that hold for it.
        """
        facts: dict[str, float] = {"skipped": 1} if attempt is None else self._ran(attempt, number)
        facts |= {
            "learning_rate": rate,
            "consumed_sequences": number * self.run.training.global_batch_size,
            **self._notes,
        }
        if decisions:
            facts["recovery/decisions"] = decisions
        self._waiting.append((number, facts))
        self._notes = {}
        if number % self.run.logging.interval == 0 or number == self.run.training.steps:
            self.interval()

    def _ran(self, attempt: StepAttempt, number: int) -> dict[str, float]:
        losses = attempt.losses
        if losses.weighted.numel() and self.objective.only_masks_supervised:
            self.by_ratio.add(losses.weighted, losses.mask_ratio, losses.supervised)
        if self.throughput is not None:
            tokens = self.run.training.global_batch_size * self.run.training.sequence_length
            self.throughput.add(tokens, self._work(self.objective.pattern(number - 1)))
        self.last_loss = attempt.loss
        return {
            "loss": attempt.loss,
            **self.objective.metrics(attempt.loss, self.data.bytes_per_token),
            **self.objective.parts(attempt.loss, attempt.clean_loss),
            "grad_norm": attempt.grad_norm,
        }

    def interval(self) -> None:
        """Reduce and write everything since the last interval (collective)."""
        if not self._waiting:
            return
        ran = sum("skipped" not in facts for _, facts in self._waiting)
        reading = self.expert_load.read(ran)
        figures = self._figures(reading)
        last, facts = self._waiting.pop()
        for number, line in [*self._waiting, (last, facts | figures)]:
            self._write(number, line)
        self._waiting.clear()
        if self.writer is not None:
            if reading is not None:
                self.writer.write_experts(last, reading.line(), reading.image())
            self.callbacks.log(self.writer.flush())
        self.progress.update(last, _known(self.last_loss), figures.get("tokens_per_second"), self._utilization(figures))

    def _utilization(self, figures: dict[str, float]) -> str | None:
        """The share of the measured peak that the model's operations reach, and of which precision, for people."""
        if self._peak_flops is None or "model_flops_utilization" not in figures:
            return None
        return f"{figures['model_flops_utilization']:.0%} of {rate_text(self._peak_flops)} {self._peak_precision}"

    def go_back(self, step: int) -> None:
        """The steps after `step` are run again: what was written of them goes."""
        self._waiting.clear()
        self._notes = {}
        self.by_ratio.reset()
        self.expert_load.reset()
        if self.throughput is not None:
            self.throughput.restart()
        if self.writer is not None:
            self.writer.go_back(step + 1)

    def missing(self) -> list[str]:
        """On rank 0: the name of the metrics file, if what stands under it is not the file that is written to."""
        return [] if self.writer is None or self.writer.in_place() else [self.writer.name]

    def reopen(self, step: int) -> None:
        """Write to new files from the step after `step` on: the folder of the old ones went away."""
        if self.writer is not None:
            self.writer.go_back(step + 1)

    def decision(self, step: int, text: str) -> None:
        """A decision of the recovery policy, for TensorBoard at the first step it holds for."""
        if self.writer is not None:
            self.writer.write_text(step, "recovery", text)

    def _figures(self, reading: ExpertReading | None) -> dict[str, float]:
        memory = torch.tensor(peak_memory_gb(device.current()), dtype=torch.float64, device=device.current())
        torch.distributed.all_reduce(memory)
        figures = {"peak_memory_gb_all_ranks": float(memory), **self.by_ratio.reduce()}
        if self.throughput is not None:
            figures |= self.throughput.read(self._measured_peak(self.throughput))
        return figures | ({} if reading is None else reading.scalars(figures.get("seconds_per_step")))

    def validation(self, number: int, result: Likelihood, bytes_per_token: float) -> float | None:
        """Keep the held-out bits per byte for the line of step `number`, which is reported next; returns them: of a
        model that also decodes from left to right those of that, and the bound of its drafts is kept beside them.

        Of an objective whose validation is no bound, keep the loss in nats per token instead, and return None.
        """
        if not self.objective.validation_is_bound:
            self.note("validation/loss", result.nats_per_token)
            loss = f"loss {result.nats_per_token:.4f}"
            self.progress.message(f"step {number}: validation {loss} over {result.sequences} sequences")
            return None
        bits, text = result.bits_per_byte(bytes_per_token), ""
        self.note("validation/bits_per_byte", bits)
        if result.drafted is not None:
            bound = result.drafted.bits_per_byte(bytes_per_token)
            self.note("validation/diffusion_bits_per_byte", bound)
            text = f" from left to right (exact), at most {bound:.4f} in blocks (the bound of diffusion)"
        over = f"over {result.sequences} sequences"
        self.progress.message(f"step {number}: validation {bits:.4f} bits per byte{text} {over}")
        return bits

    def note(self, name: str, value: float) -> None:
        """Keep a figure for the line of the next step that is reported."""
        self._notes[name] = value

    def untimed(self) -> AbstractContextManager[None]:
        """What runs inside does not count as training time."""
        return self.throughput.paused() if self.throughput is not None else nullcontext()

    def message(self, text: str) -> None:
        """One line on rank 0's terminal."""
        self.progress.message(text)

    def warning(self, text: str) -> None:
        """One line on rank 0's terminal and in every rank's log."""
        logging.getLogger(__name__).warning(text)
        self.message(text)

    def _write(self, number: int, line: dict[str, float]) -> None:
        if self.writer is not None:
            self.writer.write(number, line)

    def close(self) -> None:
        """Close the files and end the callbacks; what waits for its interval is left out, as on a crash."""
        if self.writer is not None:
            self.writer.close()
            self.callbacks.end()


def context_balance(lengths: NDArray[np.int64], positions: int, ranks: int, pattern: AttentionPattern) -> str:
    """How even the attention of the first step is over context ranks; arguments as of `busiest_over_mean`."""
    balance = busiest_over_mean(lengths, positions, ranks, pattern)
    names = {None: "full attention", 1: "causal attention"}
    blocks = f"attention in blocks of {pattern.block}"
    seen = f"{blocks} over two copies" if pattern.doubled else names.get(pattern.block, blocks)
    return f"context parallel {ranks}, {seen}: the busiest rank has {balance:.2f} times the mean's pairs of tokens"


def _known(loss: float) -> float | None:
    """A run may begin with a step that is left out."""
    return None if math.isnan(loss) else loss
