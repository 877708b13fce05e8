"""Bytes that a rank sends in one step, by parallel axis, and over which kind of link.

A gather or a scatter of n ranks sends (n - 1) / n of the whole from each, a sum over all ranks twice that. Activations
are of the run's precision, gradients and weights as its `Widths` say. The few numbers that ranks agree on in a step
(losses, norms, counts of tokens) are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from llada_megatron.llada_moe.planning.activations import element
from llada_megatron.llada_moe.planning.held_parameters import Held, shard
from llada_megatron.llada_moe.planning.workload import Workload

TENSOR_FORWARD, TENSOR_BACKWARD = 2, 3
"""Collectives of a block (attention or a feed-forward): a gather and a scatter; backwards also the gather of the input
once more, for the gradient of the weight."""


@dataclass(frozen=True)
class Traffic:
    """What one rank sends along an axis in a step."""

    axis: str
    ranks: int
    sent: float
    """Bytes."""
    outside: float
    """Share of it that leaves the node."""


def traffic(workload: Workload, held: list[Held], gpus_per_node: int) -> list[Traffic]:
    """Of the rank that sends most along each axis; axes of one rank are left out."""
    layout = workload.layout
    stages = range(layout.pipeline_parallel)
    strides = {
        "tensor": (layout.tensor_parallel, 1),
        "context": (layout.context_parallel, layout.tensor_parallel),
        "expert": (layout.expert_parallel * layout.expert_tensor_parallel, 1),
        "pipeline": (layout.pipeline_parallel, layout.world_size // layout.pipeline_parallel),
        "data": (workload.dense_copies, layout.tensor_parallel),
        "expert data": (workload.expert_copies, layout.expert_parallel * layout.expert_tensor_parallel),
    }
    sent = {
        "tensor": max(tensor_bytes(workload, stage) for stage in stages),
        "context": max(context_bytes(workload, stage) for stage in stages),
        "expert": max(exchange_bytes(workload, stage) for stage in stages),
        "pipeline": max(pipeline_bytes(workload, stage) for stage in stages),
        "data": max(data_bytes(workload, each.dense, workload.dense_copies) for each in held),
        "expert data": max(data_bytes(workload, each.experts, workload.expert_copies) for each in held),
    }
    return [
        Traffic(axis, ranks, sent[axis], outside_share(ranks, stride, gpus_per_node, axis))
        for axis, (ranks, stride) in strides.items()
        if ranks > 1 and sent[axis] > 0
    ]


def outside_share(ranks: int, stride: int, gpus_per_node: int, axis: str) -> float:
    """Share of a group's bytes that goes to other nodes: in a ring the hop between nodes, in an all-to-all the peers
    that are elsewhere."""
    near = max(1, gpus_per_node // stride)
    if ranks <= near:
        return 0.0
    if axis == "expert":
        return (ranks - near) / (ranks - 1)
    return 1.0 / near


def tensor_bytes(workload: Workload, stage: int) -> float:
    """Of a stage: attention and feed-forwards, the embedding, the output layer with its loss, and gradients of norms.

    A routed feed-forward has none of its own, its shared expert has.
    """
    layout, stack = workload.layout, workload.stack
    if layout.tensor_parallel == 1:
        return 0.0
    layers = workload.stage_layers[stage]
    blocks = sum(1 + (not stack.has_experts(layer) or stack.shared_ffn > 0) for layer in layers)
    collectives = TENSOR_FORWARD + TENSOR_BACKWARD if layout.sequence_parallel else 4
    if workload.recompute == "full":
        collectives += TENSOR_FORWARD
    wholes = blocks * collectives + 2 * (stage == 0)  # the embedding's rows are scattered, and their gradients gathered
    passes = wholes * element(workload) * workload.tokens * stack.hidden
    if stage == layout.pipeline_parallel - 1:
        passes += _head_bytes(workload)
    once = _whole_parameters(workload, stage) * 2 * workload.widths.gradient if layout.sequence_parallel else 0.0
    others = (layout.tensor_parallel - 1) / layout.tensor_parallel
    return others * (passes * workload.micro_batches + once)


def _head_bytes(workload: Workload) -> float:
    """Rows of the output layer, and the three sums of a cross-entropy over a vocabulary that is cut."""
    rows = workload.tokens * workload.supervised_mean
    gathers = 3 if workload.layout.sequence_parallel else 2
    again = 1 + workload.logits_again
    return rows * (element(workload) * workload.stack.hidden * (gathers + workload.logits_again) + 3 * 2 * 4 * again)


def _whole_parameters(workload: Workload, stage: int) -> float:
    """Norms and routers, which every tensor rank holds and sees a part of the tokens of."""
    stack = workload.stack
    count = 0
    for layer in workload.stage_layers[stage]:
        count += 2 * stack.hidden + 2 * stack.head_dim * stack.qk_norm
        count += stack.experts * stack.hidden * stack.has_experts(layer)
    return count + stack.hidden * (stage == workload.layout.pipeline_parallel - 1)


def context_bytes(workload: Workload, stage: int) -> float:
    """Keys and values gathered, kept, and their gradients scattered."""
    layout, stack = workload.layout, workload.stack
    if layout.context_parallel == 1:
        return 0.0
    both = 2 * stack.key_features_of_rank(layout.tensor_parallel) * workload.tokens * element(workload)
    passes = 2 + (workload.recompute == "full")
    return passes * both * (layout.context_parallel - 1) * len(workload.stage_layers[stage]) * workload.micro_batches


def exchange_bytes(workload: Workload, stage: int) -> float:
    """To the experts and back, forwards and backwards."""
    layout, stack = workload.layout, workload.stack
    ranks = layout.expert_parallel * layout.expert_tensor_parallel
    if ranks == 1:
        return 0.0
    layers = [layer for layer in workload.stage_layers[stage] if stack.has_experts(layer)]
    passes = 6 if workload.recompute == "full" or "moe" in workload.modules else 4
    rows = workload.tokens / workload.sequence_shards * sum(map(workload.rows_per_token, layers))
    each = passes * element(workload) * stack.hidden + passes // 2 * 4  # a row's weight travels with it one way
    return workload.micro_batches * rows * each * (ranks - 1) / ranks


def pipeline_bytes(workload: Workload, stage: int) -> float:
    """Activations to the next stage and gradients to the one before, of every chunk."""
    layout = workload.layout
    if layout.pipeline_parallel == 1:
        return 0.0
    chunks, last = layout.pipeline_chunks_per_rank, layout.pipeline_parallel - 1
    forwards = chunks - (stage == last)
    backwards = chunks - (stage == 0)
    each = element(workload) * workload.tokens * workload.stack.hidden / workload.sequence_shards
    return (forwards + backwards) * workload.micro_batches * each


def data_bytes(workload: Workload, count: int, ranks: int) -> float:
    """Gradients of so many parameters scattered over `ranks` ranks, and their weights gathered."""
    return (workload.widths.gradient + workload.widths.gathered) * shard(count, ranks) * (ranks - 1)
