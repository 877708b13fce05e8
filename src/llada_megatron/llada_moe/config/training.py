"""How long a run is, and how large its steps: the keys of `training`, and what does not fit the layout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.parsing import Refuse


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How long and how large."""

    steps: int
    sequence_length: int
    global_batch_size: int
    """Sequences per optimizer step, over all ranks."""
    micro_batch_size: int = 1
    """Sequences per forward pass on one data-parallel rank; the rest is gradient accumulation."""
    seed: int = 0
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 main weights and reduces gradients in fp32."""
    recompute: Literal["none", "full"] = "none"
    """full = keep only each layer's input, run the layer again in the backward pass."""
    logits_chunk_mb: int = 256
    """The output layer and loss run over row chunks whose fp32 logits on one rank take at most this much memory."""


def check_batch(training: TrainingConfig, model: ModelConfig, layout: LayoutConfig, refuse: Refuse) -> None:
    """Sequence length and batch sizes against the model and the layout."""
    positive = ("steps", "sequence_length", "global_batch_size", "micro_batch_size", "logits_chunk_mb")
    wrong = [key for key in positive if getattr(training, key) < 1]
    for key in wrong:
        refuse(f"training.{key}", f"{getattr(training, key)} must be at least 1")
    if not 0 <= training.seed < 2**32:
        refuse("training.seed", f"{training.seed} must lie between 0 and {2**32 - 1}")
    if (
        wrong
        or min(layout.tensor_parallel, layout.context_parallel, layout.data_parallel, layout.pipeline_parallel) < 1
    ):
        return
    check_sequence(training.sequence_length, model.max_sequence_length, layout, refuse)
    _check_global_batch(training, layout, refuse)


def _check_global_batch(training: TrainingConfig, layout: LayoutConfig, refuse: Refuse) -> None:
    """The global batch is a whole number of micro-batches on each rank, and of rounds of interleaved chunks."""
    per_forward = training.micro_batch_size * layout.data_parallel
    if training.global_batch_size % per_forward:
        below = training.global_batch_size // per_forward * per_forward
        usable = " or ".join(str(size) for size in (below, below + per_forward) if size)
        per_rank = training.global_batch_size // layout.data_parallel
        if training.global_batch_size % layout.data_parallel == 0:
            usable += f", or training.micro_batch_size={math.gcd(per_rank, training.micro_batch_size)}"
        refuse(
            "training.global_batch_size",
            f"{training.global_batch_size} is not a multiple of micro_batch_size {training.micro_batch_size} x "
            "data_parallel "
            f"{layout.data_parallel} = {per_forward}; use {usable}",
        )
    elif layout.pipeline_chunks_per_rank > 1 and training.global_batch_size // per_forward % layout.pipeline_parallel:
        refuse(
            "training.global_batch_size",
            f"global_batch_size {training.global_batch_size} / {per_forward} = "
            f"{training.global_batch_size // per_forward} micro-batches, "
            f"not a multiple of pipeline_parallel {layout.pipeline_parallel}, which interleaved chunks need",
        )


def check_sequence(length: int, longest: int, layout: LayoutConfig, refuse: Refuse) -> None:
    """The sequence fits the model and cuts evenly over context and sequence parallelism."""
    if length > longest:
        refuse(
            "training.sequence_length",
            f"{length} is longer than the model's max_sequence_length {longest}",
        )
    if length % layout.context_parallel:
        refuse("layout.context_parallel", f"{layout.context_parallel} does not divide sequence_length {length}")
    elif layout.sequence_parallel and length // layout.context_parallel % layout.tensor_parallel:
        refuse(
            "layout.sequence_parallel",
            f"sequence_length {length} / context_parallel {layout.context_parallel} = "
            f"{length // layout.context_parallel} "
            f"is not a multiple of tensor_parallel {layout.tensor_parallel}",
        )
