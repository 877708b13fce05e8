"""How many parameters a model has, part by part, and what each rank of a layout holds: closed forms, no tensors.

The tests build the same models on the meta device and find the same numbers.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.trained_parts import EXPERTS, SHARED_EXPERTS, FrozenPart, LoRAConfig
from llada_megatron.llada_moe.config.training import TrainingConfig

SWIGLU_MATRICES = 3
BUFFERS = frozenset({"expert_bias"})
"""Parts that the published figures count and no optimizer trains."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a whole model."""

    parts: dict[str, int]
    active: int
    """What one token meets: everything but the routed experts it does not visit; both embeddings included."""

    @property
    def total(self) -> int:
        """The published way of counting: trainable parameters and expert-bias buffers."""
        return sum(self.parts.values())

    @property
    def trainable(self) -> int:
        """What the optimizer updates."""
        return sum(count for part, count in self.parts.items() if part not in BUFFERS)


@dataclass(frozen=True)
class RankShare:
    """Ranks of a layout that hold the same layers and experts, and how many trainable parameters each of them holds."""

    ranks: list[int]
    pipeline: int
    expert: int
    layers: list[int]
    experts: range | None
    embedding: bool
    output: bool
    parameters: int


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Parameters of `model`, by part."""
    parts: Counter[str] = Counter()
    for layer in range(model.num_layers):
        parts += layer_parameters(model, layer, LayoutConfig())
    parts["embedding"] = model.vocab_size * model.hidden_size
    parts["final_norm"] = model.hidden_size
    if not model.tie_embeddings:
        parts["output"] = model.vocab_size * model.hidden_size
    idle = 0
    if model.moe is not None:
        idle = parts["experts"] // model.moe.num_experts * (model.moe.num_experts - model.moe.top_k)
    return ParameterCount(parts=dict(parts), active=sum(parts.values()) - idle)


_PART_NAMES: dict[str, FrozenPart] = {
    "embedding": "embedding",
    "output": "output_layer",
    "attention": "attention",
    "dense_feed_forward": "mlp",
    "router": "router",
    "experts": "experts",
    "shared_experts": "shared_experts",
    "norms": "norms",
    "final_norm": "norms",
}
"""What `training.frozen` calls the parts of a count."""


def trained_parameters(model: ModelConfig, training: TrainingConfig) -> int:
    """Parameters of the whole model that a run trains: of low-rank factors, or of what it does not freeze."""
    if training.lora is not None:
        return factor_parameters(model, training.lora)
    parts = count_parameters(model).parts
    return sum(parts[part] for part, name in _PART_NAMES.items() if part in parts and name not in training.frozen)


def factor_parameters(model: ModelConfig, lora: LoRAConfig) -> int:
    """Parameters of all low-rank factors of a model."""
    moe = model.moe
    dense = model.num_layers if moe is None else moe.leading_dense_layers
    total = 0
    for place, widths in lora.places(model).items():
        if place.startswith("self_attention."):
            count = model.num_layers
        elif place.startswith(SHARED_EXPERTS):
            count = model.num_layers - dense
        elif moe is not None and place.startswith(EXPERTS):
            count = (model.num_layers - dense) * moe.num_experts
        else:
            count = dense
        total += count * lora.rank * sum(widths)
    return total


def layer_parameters(model: ModelConfig, layer: int, layout: LayoutConfig) -> Counter[str]:
    """Parameters, by part, of layer number `layer` (from 0) on one rank of `layout`.

    Tensor parallelism cuts the projections and feed-forwards; norms and the router stand on every tensor-parallel rank.
    """
    hidden, heads, key_heads = model.hidden_size, model.num_attention_heads, model.num_key_value_heads
    tensor = layout.tensor_parallel
    projections = hidden * model.head_dim * (2 * heads + 2 * key_heads)
    parts = Counter(attention=projections // tensor, norms=2 * hidden)
    if model.qk_norm:
        parts["norms"] += 2 * model.head_dim
    moe = model.moe
    if moe is None or layer < moe.leading_dense_layers:
        parts["dense_feed_forward"] = SWIGLU_MATRICES * hidden * model.ffn_hidden_size // tensor
        return parts
    one_expert = SWIGLU_MATRICES * hidden * moe.expert_ffn_hidden_size // layout.expert_tensor_parallel
    parts["experts"] = moe.num_experts // layout.expert_parallel * one_expert
    parts["router"] = moe.num_experts * hidden
    if moe.shared_expert_ffn_hidden_size:
        parts["shared_experts"] = SWIGLU_MATRICES * hidden * moe.shared_expert_ffn_hidden_size // tensor
    if moe.expert_bias:
        parts["expert_bias"] = moe.num_experts
    return parts


def rank_shares(model: ModelConfig, layout: LayoutConfig) -> list[RankShare]:
    """What each rank holds, ranks with the same layers and experts together.

    Megatron numbers ranks with the tensor axis fastest, then context, data and pipeline; the ranks of one pipeline
    stage are numbered again for the experts, with the expert-tensor axis fastest and then the expert axis.
    """
    shares = []
    per_stage = layout.world_size // layout.pipeline_parallel
    for pipeline in range(layout.pipeline_parallel):
        for expert in range(layout.expert_parallel):
            ranks = [
                pipeline * per_stage + rank
                for rank in range(per_stage)
                if rank // layout.expert_tensor_parallel % layout.expert_parallel == expert
            ]
            shares.append(_share(model, layout, ranks, pipeline, expert))
    return shares


def stage_layers(model: ModelConfig, layout: LayoutConfig, pipeline: int) -> list[int]:
    """Layers (from 0) of one pipeline stage; interleaved, chunk c of every stage comes before chunk c + 1 of any."""
    sizes = layout.chunk_layers(model.num_layers)
    ends = list(itertools.accumulate(sizes))
    mine = range(pipeline, len(sizes), layout.pipeline_parallel)
    return [layer for chunk in mine for layer in range(ends[chunk] - sizes[chunk], ends[chunk])]


def _share(model: ModelConfig, layout: LayoutConfig, ranks: list[int], pipeline: int, expert: int) -> RankShare:
    layers = stage_layers(model, layout, pipeline)
    first, last = pipeline == 0, pipeline == layout.pipeline_parallel - 1
    parts = sum((layer_parameters(model, layer, layout) for layer in layers), Counter())
    count = sum(number for part, number in parts.items() if part not in BUFFERS)
    table = model.vocab_size * model.hidden_size // layout.tensor_parallel
    # A tied output layer is the embedding itself, or its copy where the last stage is not the first.
    output = last and not (first and model.tie_embeddings)
    count += table * (first + output) + (model.hidden_size if last else 0)
    held = None
    if model.moe is not None and parts["experts"]:
        size = model.moe.num_experts // layout.expert_parallel
        held = range(expert * size, (expert + 1) * size)
    return RankShare(ranks, pipeline, expert, layers, held, first, output, count)
