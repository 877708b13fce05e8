"""Parameters that a rank holds, and the bytes of their forms: weights, gradients, main weights, Adam's moments.

Experts are held and their optimizer state is shared by other groups of ranks than the rest, so that they are always
counted apart (Megatron-LM's own estimate once divided them by the tensor ranks: its issues 2439 and 4050).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llada_megatron.llada_moe.planning.workload import Stack, Workload

ALIGNED = 64
"""The distributed optimizer starts each parameter at a multiple of this many elements of its buffer."""


@dataclass(frozen=True)
class Held:
    """Parameters of one rank: what is not a routed expert, and routed experts."""

    dense: int
    experts: int


def attention_parameters(stack: Stack, tensor: int) -> int:
    """Of one layer on one rank: projections, their biases, and the norms of heads."""
    hidden, latent = stack.hidden, stack.latent
    if latent is not None:
        size = latent.head + latent.position_head
        cut = stack.heads * (latent.key_value_rank * (latent.head + latent.value_head) + latent.value_head * hidden)
        queries = latent.query_rank or hidden
        cut += queries * stack.heads * size
        whole = hidden * (latent.key_value_rank + latent.position_head) + latent.key_value_rank
        whole += (hidden + 1) * latent.query_rank
        return cut // tensor + whole
    count = 2 * hidden * (stack.query_features + stack.key_features) // tensor
    if stack.biases:
        count += (stack.query_features + 2 * stack.key_features) // tensor + hidden
    return count + 2 * stack.head_dim * stack.qk_norm


def layer_parameters_held(stack: Stack, layer: int, workload: Workload) -> Held:
    """Of layer number `layer` (from 0) on one rank."""
    layout, hidden = workload.layout, stack.hidden
    dense = attention_parameters(stack, layout.tensor_parallel) + 2 * hidden * (1 + stack.layer_norm)
    width = stack.shared_ffn if stack.has_experts(layer) else stack.ffn
    dense += stack.matrices * hidden * width // layout.tensor_parallel
    if stack.biases and width:
        dense += (stack.matrices - 1) * width // layout.tensor_parallel + hidden
    if not stack.has_experts(layer):
        return Held(dense, 0)
    one = stack.matrices * hidden * stack.expert_ffn // layout.expert_tensor_parallel
    return Held(dense + stack.experts * hidden, stack.experts // layout.expert_parallel * one)


def stage_parameters(workload: Workload, stage: int) -> Held:
    """Of one rank of a pipeline stage. Tied embeddings stand on the first and on the last stage."""
    stack, layout = workload.stack, workload.layout
    first, last = stage == 0, stage == layout.pipeline_parallel - 1
    parts = [layer_parameters_held(stack, layer, workload) for layer in workload.stage_layers[stage]]
    if last and stack.extra_heads:
        extra = layer_parameters_held(stack, stack.layers - 1, workload)
        merging = 2 * stack.hidden * stack.hidden // layout.tensor_parallel + 3 * stack.hidden
        parts += [Held(extra.dense + merging, extra.experts)] * stack.extra_heads
    dense, experts = sum(part.dense for part in parts), sum(part.experts for part in parts)
    table = stack.vocab * stack.hidden // layout.tensor_parallel
    # the extra heads look tokens up as well: their stage has a copy of the embedding
    tables = first + (last and not (first and stack.tied)) + (last and not first and stack.extra_heads > 0)
    dense += table * tables + stack.learned_positions * stack.hidden * first
    return Held(dense + stack.hidden * (1 + stack.layer_norm) * last, experts)


def state_bytes(workload: Workload, held: Held) -> dict[str, float]:
    """Bytes of weights, gradients, main weights and moments, from what a rank holds."""
    widths = workload.widths
    copies = (workload.dense_copies, workload.expert_copies) if workload.distributed_optimizer else (1, 1)
    shards = sum(shard(count, ranks) for count, ranks in zip((held.dense, held.experts), copies, strict=True))
    count = held.dense + held.experts
    return {
        "weights": widths.weight * count,
        "gradients": widths.gradient * count,
        "main weights": widths.main * shards,
        "optimizer": widths.moments * shards,
    }


def shard(count: int, ranks: int) -> int:
    """Elements of one of `ranks` shards of a buffer, whose end is padded for all of them."""
    return math.ceil(count / math.lcm(ranks, 2 * ALIGNED)) * math.lcm(ranks, 2 * ALIGNED) // ranks
