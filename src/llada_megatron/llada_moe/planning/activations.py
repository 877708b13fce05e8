"""Bytes that a layer keeps of one micro-batch until its backward pass, in bf16 with flash attention.

Kept are the inputs and outputs of norms, queries, keys and values after the rotation, the output of attention with its
soft-max sums, and what the feed-forward's products and activation need. With Transformer Engine a product keeps the
part of its input that its sequence shard holds and gathers it again.
"""

from __future__ import annotations

from dataclasses import replace

from llada_megatron.llada_moe.planning.workload import Workload


def element(workload: Workload) -> float:
    """Bytes of an activation."""
    return 4.0 if workload.widths.compute == "fp32" else 2.0


def kept_of_layer(workload: Workload, layer: int) -> float:
    """Bytes that layer number `layer` (from 0) keeps of one micro-batch on one rank."""
    if workload.recompute == "full":
        return workload.tokens * element(workload) * workload.stack.hidden / workload.sequence_shards
    attention, feed_forward = _attention(workload), _feed_forward(workload, layer)
    return workload.tokens * (attention + feed_forward)


def working_set(workload: Workload, layer: int) -> float:
    """Bytes that a layer which is run again keeps while its backward pass goes on."""
    return kept_of_layer(replace(workload, recompute="selective", modules=workload.modules & {"moe_act"}), layer)


def _norm(workload: Workload) -> float:
    """Input and output of a norm, for each token; the output is made again with `layernorm`."""
    both = 1 if "layernorm" in workload.modules else 2
    return (both * element(workload) + 1 * workload.stack.dropout) * workload.stack.hidden / workload.sequence_shards


def _attention(workload: Workload) -> float:
    stack, tensor, size = workload.stack, workload.layout.tensor_parallel, element(workload)
    kept = _norm(workload) + 4 * stack.heads / tensor
    latent = stack.latent
    if latent is None:
        shards = workload.layout.context_parallel if workload.gathered_keys else 1
        queries, keys = stack.query_features / tensor, stack.key_features_of_rank(tensor)
        kept += size * (2 * queries + 2 * shards * keys)
        return kept + size * (queries + keys) * stack.qk_norm
    ranks = 2 * latent.query_rank + 2 * latent.key_value_rank + latent.position_head
    heads = stack.heads * (2 * (latent.head + latent.position_head) + 2 * latent.value_head)
    if "mla_up_proj" in workload.modules:
        heads = stack.heads * latent.value_head
    return kept + size * (ranks / workload.sequence_shards + heads / tensor)


def _feed_forward(workload: Workload, layer: int) -> float:
    stack, size, tensor = workload.stack, element(workload), workload.layout.tensor_parallel
    if not stack.has_experts(layer):
        return _norm(workload) + (0 if "mlp" in workload.modules else size * stack.matrices * stack.ffn / tensor)
    if "moe" in workload.modules:
        return _norm(workload)
    shared = 0 if "shared_experts" in workload.modules else size * stack.matrices * stack.shared_ffn / tensor
    return _norm(workload) + _routed(workload, layer) + shared


def _routed(workload: Workload, layer: int) -> float:
    """Router, sorted copies of tokens, and the experts' own tensors, for each token before tensor ranks share them."""
    stack, size, layout = workload.stack, element(workload), workload.layout
    rows = workload.rows_per_token(layer) / workload.sequence_shards
    matrices = stack.matrices - 1 if "moe_act" in workload.modules else stack.matrices
    # expert-tensor ranks gather the rows of each other, and each computes its part of the width
    inside = stack.hidden * layout.expert_tensor_parallel + matrices * stack.expert_ffn
    return rows * (size * inside + 8) + 8 * stack.experts / workload.sequence_shards


def in_flight(workload: Workload, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once, all of its chunks together."""
    stages, chunks = workload.layout.pipeline_parallel, workload.layout.pipeline_chunks_per_rank
    if chunks == 1:
        return min(workload.micro_batches, stages - stage)
    extra = 1 if workload.overlap_exchange else 0  # one more chunk's forward pass runs beside each backward pass
    return min(workload.micro_batches, (2 * (stages - stage - 1) + (chunks - 1) * stages + 1 + extra) / chunks)
