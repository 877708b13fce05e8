"""What a run says of itself: a line of metrics for every step, figures and progress every interval, on rank 0."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from megatron.core import parallel_state

from llada_megatron.llada_moe.config.schema import RunConfig
from llada_megatron.llada_moe.data.batch import Batch
from llada_megatron.llada_moe.data.loader import TrainingData
from llada_megatron.llada_moe.evaluation.likelihood import Likelihood
from llada_megatron.llada_moe.model.flops import FORMULA, block_causal_keys, flops_per_token
from llada_megatron.parallel import device
from llada_megatron.parallel.expert_load import ExpertLoad, load_scalars
from llada_megatron.parallel.metrics import MaskRatioLoss, MetricsWriter, Throughput, bits_per_byte
from llada_megatron.parallel.peak import matmul_peak, peak_memory_gb
from llada_megatron.parallel.progress import Progress
from llada_megatron.parallel.step import StepResult


class Reporter:
    """Collects what the steps return, and every `logging.interval` steps reduces it over the ranks and writes it down.

    Between intervals nothing is reduced and nothing waits for the device.
    """

    def __init__(self, run: RunConfig, models: list[torch.nn.Module], data: TrainingData, first_step: int) -> None:
        """Collective: measures the machine's matrix-product peak on all ranks at once."""
        self.run, self.data = run, data
        self.rank = torch.distributed.get_rank()
        directory = Path(run.output_dir)
        self.writer = MetricsWriter(directory, run.logging.tensorboard, first_step + 1) if self.rank == 0 else None
        self.progress = Progress(run.training.steps, first_step, rank=self.rank)
        self.expert_load = ExpertLoad(models)
        self.by_ratio = MaskRatioLoss(device=device.current())
        self.throughput: Throughput | None = None
        self.last_loss = float("nan")
        self._waiting: list[tuple[int, StepResult, float, dict[str, float]]] = []
        self._validation: dict[str, float] = {}

    def start(self, batches: list[Batch]) -> None:
        """Measure the ceiling and the work per token, from the first step's batches (collective)."""
        peak = torch.tensor(matmul_peak(device.current(), self._dtype()), dtype=torch.float64, device=device.current())
        torch.distributed.all_reduce(peak)
        diffusion = self.run.objective.kind == "diffusion"
        objective = self.run.objective
        mean_ratio = 1.0 if objective.replace_ratio else (objective.mask_ratio_min + objective.mask_ratio_max) / 2
        work = flops_per_token(
            self.run.model,
            self.run.training.sequence_length,
            keys_per_query=self._keys_per_query(batches),
            supervised_share=mean_ratio if diffusion else 1.0,
        ).total
        self.throughput = Throughput(work, float(peak))
        if self.rank == 0:
            self.progress.message(
                f"model FLOPs per token {work:.4g}; measured peak {float(peak):.4g} FLOP/s over all ranks"
            )
            self.progress.message(FORMULA)

    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.run.training.precision == "bf16" else torch.float32

    def _keys_per_query(self, batches: list[Batch]) -> float:
        """Keys that a token sees on average, in the segments of these batches."""
        lengths = torch.cat([batch.boundaries.diff() for batch in batches]).tolist()
        block = 1 if self.run.objective.kind == "autoregressive" else self.run.objective.block_size
        seen = sum(length * block_causal_keys(length, block or length) for length in lengths if length)
        sums = torch.tensor([seen, sum(lengths)], dtype=torch.float64)
        torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group_gloo())
        return float(sums[0] / sums[1])

    def step(self, number: int, result: StepResult, rate: float) -> None:
        """Take note of step `number` (from 1), which ran at learning rate `rate`."""
        self._waiting.append((number, result, rate, self._validation))
        self._validation = {}
        losses = result.losses
        if losses.weighted.numel():
            self.by_ratio.add(losses.weighted, losses.mask_ratio, losses.supervised)
        if self.throughput is not None:
            self.throughput.add(self.run.training.global_batch_size * self.run.training.sequence_length)
        if number % self.run.logging.interval == 0 or number == self.run.training.steps:
            self.interval()

    def interval(self) -> None:
        """Reduce and write everything since the last interval (collective)."""
        if not self._waiting:
            return
        values = torch.stack([result.losses.loss for _, result, _, _ in self._waiting]).double()
        torch.distributed.all_reduce(values)
        losses = (values / self.run.layout.tensor_parallel).tolist()
        figures = self._figures()
        for (number, result, rate, validation), loss in zip(self._waiting, losses, strict=True):
            line = {
                "loss": loss,
                "bits_per_byte": bits_per_byte(loss, self.data.bytes_per_token),
                "grad_norm": result.grad_norm,
                "learning_rate": rate,
                "consumed_sequences": number * self.run.training.global_batch_size,
                **validation,
            }
            last = number == self._waiting[-1][0]
            self._write(number, line | (figures if last else {}))
        self.last_loss = losses[-1]
        number = self._waiting[-1][0]
        self._waiting.clear()
        if self.writer is not None:
            self.writer.flush()
        self.progress.update(number, self.last_loss, figures.get("tokens_per_second"))

    def _figures(self) -> dict[str, float]:
        memory = torch.tensor(peak_memory_gb(device.current()), dtype=torch.float64, device=device.current())
        torch.distributed.all_reduce(memory)
        figures = {
            "peak_memory_gb_all_ranks": float(memory),
            **self.by_ratio.reduce(),
            **load_scalars(self.expert_load.reduce()),
        }
        return figures | (self.throughput.read() if self.throughput is not None else {})

    def validation(self, number: int, result: Likelihood, bytes_per_token: float) -> float:
        """Keep the held-out bits per byte for the line of step `number`, which is reported next; returns them."""
        bits = result.bits_per_byte(bytes_per_token)
        self._validation = {"validation/bits_per_byte": bits}
        self.progress.message(f"step {number}: validation {bits:.4f} bits per byte over {result.sequences} sequences")
        return bits

    def untimed(self) -> AbstractContextManager[None]:
        """What runs inside does not count as training time."""
        return self.throughput.paused() if self.throughput is not None else nullcontext()

    def message(self, text: str) -> None:
        """One line on rank 0's terminal."""
        self.progress.message(text)

    def _write(self, number: int, line: dict[str, float]) -> None:
        if self.writer is not None:
            self.writer.write(number, line)

    def close(self) -> None:
        """Close the files; what waits for its interval is left out, as on a crash."""
        if self.writer is not None:
            self.writer.close()
