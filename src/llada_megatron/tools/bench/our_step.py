"""This project's training step on one rank, as `llada train` builds it, and random batches for both sides.

It imports Megatron, so it is imported where `parallel.device` is installed (inside `single_process`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from llada_megatron.llada_moe.config.data import DataConfig, DataSetConfig
from llada_megatron.llada_moe.config.intervals import LoggingConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.optimizer import LearningRateConfig, OptimizerConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.data.batch import Batch
from llada_megatron.llada_moe.model.initialization import initialize_weights
from llada_megatron.llada_moe.model.patterns import whole_sequences
from llada_megatron.parallel.build import build_run_chunks, wrap
from llada_megatron.parallel.training.distributed_optimizer import build_optimizer
from llada_megatron.parallel.training.step import TrainingStep


@dataclass(frozen=True)
class MaskedBatch:
    """Random token ids `[batch, seq]` of which half are to be predicted: the same ones for both sides.

    The inputs at those positions are other random tokens rather than the mask token. A step costs the same, but an
    untrained router would send the equal embeddings of all masks to the same few experts: fewer and larger products, on
    both sides, than a trained router causes.
    """

    inputs: torch.Tensor
    """Corrupted at the masked positions."""
    labels: torch.Tensor
    """The original tokens."""
    masked: torch.Tensor
    """Positions to be predicted (bool)."""


def masked_batch(model: ModelConfig, sequences: int, length: int, seed: int) -> MaskedBatch:
    """Exactly half of each sequence masked, so that every repetition is the same amount of work."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(model.vocab_size, (sequences, length), generator=generator)
    masked = torch.rand(sequences, length, generator=generator).argsort(dim=1) < length // 2
    noise = torch.randint(model.vocab_size, (sequences, length), generator=generator)
    return MaskedBatch(torch.where(masked, noise, labels), labels, masked)


class FixedData:
    """Stands in for `TrainingData`: the batch that was put into it, whatever samples are asked for."""

    def __init__(self) -> None:
        self.current: Batch | None = None

    def batch(self, numbers: Sequence[int]) -> Batch:
        """The current batch."""
        if self.current is None or len(numbers) != self.current.inputs.size(0):
            raise ValueError("put a batch of the step's size into `current` first")
        return self.current


class OurStep:
    """Model, optimizer and step of a run of one process, as `llada train` builds them."""

    def __init__(
        self, run: RunConfig, initialize: Callable[[list[ShardedTensor], int, float, int], None] = initialize_weights
    ) -> None:
        """`initialize`: see `build_run_chunks`."""
        self._data = FixedData()
        chunks = build_run_chunks(run, initialize)
        self.models = wrap(run, chunks)
        self.chunk = chunks[0]
        self.optimizer = build_optimizer(run, self.models)
        self._step = TrainingStep(run, self.models, self.optimizer, self._data)
        self._number = 0

    def step(self, batch: MaskedBatch) -> float:
        """One training step; returns the loss."""
        return self.step_on(training_batch(batch))

    def step_on(self, batch: Batch) -> float:
        """The same on any batch of the run's size."""
        self._data.current = batch
        result = self._step(self._number)
        self._number += 1
        return float(result.losses.loss)


def training_batch(batch: MaskedBatch) -> Batch:
    """The batch with the diffusion weight 1/p at the masked positions (p = 1/2)."""
    masked = batch.masked
    sequences, length = masked.shape
    untruncated = torch.full((sequences,), length, dtype=torch.int64)
    ratio = masked.float().mean(dim=1)
    return Batch(
        inputs=batch.inputs,
        labels=batch.labels,
        weights=masked.float() / ratio[:, None],
        boundaries=whole_sequences(sequences, length),
        mask_ratio=ratio,
        untruncated=untruncated,
        answer=untruncated.clone(),
    )


def run_config(model: ModelConfig, sequences: int, length: int, learning_rate: float, clip: float) -> RunConfig:
    """A run of one process in fp32 whose step holds `sequences` sequences in one forward pass."""
    return RunConfig(
        model=model,
        training=TrainingConfig(
            steps=1_000_000,
            sequence_length=length,
            global_batch_size=sequences,
            micro_batch_size=sequences,
            precision="fp32",
        ),
        data=DataConfig(sets=[DataSetConfig(path="unused")]),
        optimizer=OptimizerConfig(learning_rate=LearningRateConfig(peak=learning_rate), clip_grad_norm=clip),
        logging=LoggingConfig(tensorboard=False),
        output_dir="unused",
    )
