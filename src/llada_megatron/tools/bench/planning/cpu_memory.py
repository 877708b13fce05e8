"""Memory that a rank needs on a CPU, from sizes: what this project's own CPU kernels keep, in fp32.

They keep more than Transformer Engine does. A norm keeps the normalised input beside its output; the values are a view
of the product that they come from, so that it lives beside the rotated queries and keys; attention's output is kept in
its own order and in that of the next product; a dense feed-forward keeps gate, value, the activated gate and their
product. Routed experts keep their input rows and the product before the activation.
"""

from __future__ import annotations

from dataclasses import replace

from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.planning.activations import in_flight
from llada_megatron.llada_moe.planning.held_parameters import stage_parameters, state_bytes
from llada_megatron.llada_moe.planning.workload import Workload, of_run

ELEMENT = 4
ROUTER_COPIES = 5
"""Logits, probabilities, the chosen ones, and those of the two losses, for each expert."""
LOGIT_COPIES = 3
"""fp32 logits, their exponentials and the gradient of the chunk."""


def cpu_tensors(run: RunConfig) -> list[float]:
    """Bytes of tensors that a rank of each pipeline stage holds at its fullest. Half of the rows are supervised, the
    mean of a diffusion step, and the loads of experts are even."""
    workload = of_run(run)
    return [stage_tensors(workload, stage) for stage in range(workload.layout.pipeline_parallel)]


def stage_tensors(workload: Workload, stage: int) -> float:
    """Of one stage: its state, what its layers keep, and the loss or the widest layer's backward pass."""
    layers = workload.stage_layers[stage]
    last = stage == workload.layout.pipeline_parallel - 1
    state = sum(state_bytes(workload, stage_parameters(workload, stage)).values())
    kept = sum(kept_by_layer(workload, layer) for layer in layers) * in_flight(workload, stage)
    work = max(at_work(workload, layer) for layer in layers)
    return state + kept + max(work, loss_bytes(workload) if last else 0.0)


def kept_by_layer(workload: Workload, layer: int) -> float:
    """What layer number `layer` (from 0) keeps of a micro-batch until its backward pass."""
    stack, layout = workload.stack, workload.layout
    if workload.recompute == "full":
        return workload.tokens * ELEMENT * stack.hidden / workload.sequence_shards
    queries, keys = stack.query_features / layout.tensor_parallel, stack.key_features / layout.tensor_parallel
    own = (queries + 2 * keys) + (queries + keys)  # the product, of which the values are a view; what was rotated
    if layout.context_parallel > 1:
        own = queries + 2 * keys * layout.context_parallel  # gathered keys and values take the place of its own
    attention = own + (queries + keys) * stack.qk_norm + 2 * queries
    norms = 4 * stack.hidden / workload.sequence_shards
    return workload.tokens * ELEMENT * (norms + attention + _feed_forward(workload, layer))


def _feed_forward(workload: Workload, layer: int) -> float:
    """Elements for each token."""
    stack = workload.stack
    if not stack.has_experts(layer):
        return 4 * stack.ffn / workload.layout.tensor_parallel
    rows = workload.rows_per_token(layer) / workload.sequence_shards
    rows *= workload.layout.expert_tensor_parallel  # each gathers the rows of the others and computes a part of them
    inside = stack.hidden + 2 * stack.expert_ffn / workload.layout.expert_tensor_parallel
    return rows * inside + ROUTER_COPIES * stack.experts / workload.sequence_shards


def at_work(workload: Workload, layer: int) -> float:
    """What a layer's backward pass holds beside what it keeps; with full recomputation also the layer run again."""
    stack, tensor = workload.stack, workload.layout.tensor_parallel
    wide = 2 * stack.ffn / tensor
    if stack.has_experts(layer):
        wide = 3 * workload.rows_per_token(layer) * stack.hidden / workload.sequence_shards
    again = 0.0
    if workload.recompute == "full":
        again = kept_by_layer(replace(workload, recompute="none"), layer)
    return workload.tokens * ELEMENT * (wide + stack.hidden) + again


def loss_bytes(workload: Workload) -> float:
    """Of the output layer and the cross-entropy, on the supervised rows."""
    stack = workload.stack
    rows = workload.tokens * workload.supervised_mean
    logits = min(rows * stack.vocab / workload.layout.tensor_parallel * ELEMENT, workload.logits_limit / 3)
    return LOGIT_COPIES * logits + ELEMENT * (2 * rows + workload.tokens) * stack.hidden
