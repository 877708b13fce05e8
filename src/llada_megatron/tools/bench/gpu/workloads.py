"""What the parts train: models as large as the GPU, or as small as a test, and windows of packed documents."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.data.batch import Batch
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.llada_moe.model.flops import flops_per_token
from llada_megatron.llada_moe.model.parameters import count_parameters
from llada_megatron.llada_moe.model.patterns import AttentionPattern
from llada_megatron.parallel.training.out_of_memory import activations
from llada_megatron.tools.bench.our_step import masked_batch, run_config, training_batch

SUPERVISED_SHARE = 0.5

DENSE = ModelConfig(
    family="llada",
    num_layers=20,
    hidden_size=2048,
    ffn_hidden_size=5632,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
    vocab_size=126464,
    max_sequence_length=4096,
    mask_token_id=126336,
    eos_token_id=126081,
)
"""LLaDA's proportions and vocabulary at 1.5 billion parameters, of which the layers are 1.03."""

_TOY = (48, 1, 1)
"""Positions, windows of a forward pass, and passes of a step where there is no GPU."""

BLOCK_SIZE = 32
"""Of LLaDA2's block-causal attention."""

_BYTES_PER_PARAMETER = 20
"""bf16 weights, fp32 gradients and main weights, two moments (18), and a copy of the weights in FP8."""
_MEMORY_SHARE = 0.82
"""Of a GPU that a run may need by the estimate: the rest is for CUDA, NCCL, and what the estimate leaves out."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """A training step to be measured."""

    run: RunConfig
    micro_batches: int

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.run.training.global_batch_size * self.run.training.sequence_length

    def batch(self, documents: int, seed: int = 0) -> Batch:
        """A micro-batch of windows of `documents` documents each."""
        training = self.run.training
        made = training_batch(masked_batch(self.run.model, training.micro_batch_size, training.sequence_length, seed))
        boundaries = document_boundaries(training.micro_batch_size, training.sequence_length, documents, seed)
        return dataclasses.replace(made, boundaries=boundaries)

    def flops(self, batch: Batch) -> float:
        """Model FLOPs of a step whose micro-batches are all `batch`."""
        pattern = AttentionPattern(self.run.objective.block_size)
        lengths = batch.boundaries.diff().tolist()
        keys = sum(length * pattern.keys_per_query(length) for length in lengths if length) / sum(lengths)
        length = self.run.training.sequence_length
        per_token = flops_per_token(self.run.model, length, keys_per_query=keys, supervised_share=SUPERVISED_SHARE)
        return self.tokens * per_token.total


def workload(
    model: ModelConfig, length: int, sequences: int, micro_batches: int, block_size: int | None = None, **training: Any
) -> Workload:
    """A run of one rank whose step has `micro_batches` forward passes of `sequences` windows each.

    `training`: keys of that section, such as `precision`.
    """
    run = run_config(model, sequences, length, learning_rate=1e-5, clip=1.0)
    keys = {"global_batch_size": sequences * micro_batches, "precision": "bf16", **training}
    run = dataclasses.replace(
        run,
        training=dataclasses.replace(run.training, **keys),
        objective=ObjectiveConfig(block_size=block_size),
    )
    return Workload(run, micro_batches)


def document_boundaries(sequences: int, length: int, documents: int, seed: int) -> torch.Tensor:
    """Offsets into the flattened windows: each is cut into `documents` documents at random places."""
    generator = np.random.default_rng(seed)
    edges = [0]
    for row in range(sequences):
        cuts = np.sort(generator.choice(np.arange(1, length), size=min(documents, length) - 1, replace=False))
        edges += [row * length + int(cut) for cut in cuts] + [(row + 1) * length]
    return torch.tensor(edges, dtype=torch.int32)


def as_many_layers_as_fit(work: Workload, memory: int) -> Workload:
    """The same with as many layers as fit into `memory` bytes by the estimate, at most the model's own.

    Raises:
        ResourceError: not even two fit.
    """
    whole = work.run.model
    for layers in range(whole.num_layers, 1, -1):
        run = dataclasses.replace(work.run, model=dataclasses.replace(whole, num_layers=layers))
        if needed_bytes(run) <= _MEMORY_SHARE * memory:
            return dataclasses.replace(work, run=run)
    raise ResourceError(f"two layers of {whole.family} need more than this GPU's {memory / 1e9:.0f} GB")


def needed_bytes(run: RunConfig) -> float:
    """An estimate of what training takes on one rank: parameters with gradients and optimizer, and activations."""
    return _BYTES_PER_PARAMETER * count_parameters(run.model).trainable + activations(run)


def _two_layers(name: str) -> ModelConfig:
    return dataclasses.replace(load_model(name), num_layers=2)


def dense(toy: bool, **training: Any) -> Workload:
    """Four windows a forward pass, two passes a step."""
    if toy:
        return workload(load_model("tiny-dense"), *_TOY, **training)
    return workload(DENSE, 4096, 4, 2, **training)


def llada_8b(toy: bool, **training: Any) -> Workload:
    """LLaDA-8B with eight of its layers (2.8 billion parameters with both embeddings)."""
    if toy:
        return workload(load_model("tiny-dense"), *_TOY, **training)
    return workload(dataclasses.replace(load_model("llada-8b"), num_layers=8), 4096, 2, 4, **training)


PASSES = 4
"""Forward passes of a step of a MoE model: its update, one for dozens of passes in a real run, must weigh little."""
WINDOWS = 4
"""Of a forward pass of a MoE model: fewer keep the host busy longer than the GPU."""


def moe(memory: int, **training: Any) -> Workload:
    """LLaDA-MoE-7B-A1B, as many layers as fit. No memory: a toy."""
    if not memory:
        return workload(_two_layers("tiny-moe-softmax"), *_TOY, **training)
    return as_many_layers_as_fit(workload(load_model("llada-moe-7b-a1b"), 4096, WINDOWS, PASSES, **training), memory)


RANKS = 8
"""Of expert parallelism, as the run file of LLaDA-MoE-7B-A1B has it."""


def moe_rank(toy: bool, **training: Any) -> Workload:
    """What one of `RANKS` ranks of expert parallelism computes of LLaDA-MoE-7B-A1B: its share of the experts, each with
    the tokens that all ranks send it when they are in balance. Here every token goes to all of them, so nothing is
    exchanged. Eight of its sixteen layers."""
    if toy:
        return workload(_all_to_all(_two_layers("tiny-moe-softmax"), 2), *_TOY, **training)
    model = dataclasses.replace(load_model("llada-moe-7b-a1b"), num_layers=8)
    assert model.moe is not None
    return workload(_all_to_all(model, model.moe.num_experts // RANKS), 4096, WINDOWS, PASSES, **training)


def _all_to_all(model: ModelConfig, experts: int) -> ModelConfig:
    """`experts` experts, all of which every token goes to."""
    assert model.moe is not None
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, num_experts=experts, top_k=experts))


def mini(memory: int, **training: Any) -> Workload:
    """LLaDA2-mini, as many layers as fit, block-causal. No memory: a toy."""
    if not memory:
        return workload(_two_layers("tiny-moe"), *_TOY, block_size=8, **training)
    work = workload(load_model("llada2-mini"), 4096, WINDOWS, PASSES, block_size=BLOCK_SIZE, **training)
    return as_many_layers_as_fit(work, memory)
