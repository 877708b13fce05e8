"""How much memory the backward pass needs of a forward pass: an estimate from the sizes alone.

Counted are the tensors that autograd keeps of each layer: the inputs of its norms and matrix products, queries, keys
and values, and what attention and the gated activation return. Tensors of a few numbers a token (soft-max sums, router
scores) are left out; fused kernels keep a little less than this.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llada_megatron.llada_moe.objectives import make_objective

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.model import ModelConfig
    from llada_megatron.llada_moe.config.run import RunConfig

_LOGITS_COPIES = 2.5
"""A chunk's fp32 logits, their gradient, and the products they come from and go into in the model's precision."""


@dataclass(frozen=True)
class ActivationMemory:
    """Bytes that one rank keeps for the backward pass, largest stage, by where they come from."""

    layers: float
    output_layer: float

    @property
    def total(self) -> float:
        """Both parts."""
        return self.layers + self.output_layer


def layer_elements(model: ModelConfig, layer: int, run_again: Collection[str] = ()) -> int:
    """Elements that layer number `layer` (from 0) keeps of each token.

    `run_again`: the parts of `training.recompute_modules`, which keep their inputs only.
    """
    hidden, size = model.hidden_size, model.head_dim
    heads, key_heads = model.num_attention_heads, model.num_key_value_heads
    attention = 4 * hidden + size * (2 * heads + 2 * key_heads)  # two norms' inputs and outputs; q, k, v, the result
    attention += size * (heads + key_heads) * model.qk_norm  # queries and keys before their norms
    if "layernorm" in run_again:
        attention -= 2 * hidden
    moe = model.moe
    if moe is None or layer < moe.leading_dense_layers:
        feed_forward = 4 * model.ffn_hidden_size  # gate and value, the activated gate, their product
        return attention + (0 if "mlp" in run_again else feed_forward)
    if "moe" in run_again:
        return attention
    of_expert = 2 if "moe_act" in run_again else 5  # the same, and their weighting
    routed = moe.top_k * (hidden + of_expert * moe.expert_ffn_hidden_size)
    shared = 0 if "shared_experts" in run_again else 4 * moe.shared_expert_ffn_hidden_size
    return attention + routed + shared


def activation_memory(run: RunConfig, logits_chunk_mb: int) -> ActivationMemory:
    """The estimate for `run`: its micro-batch, recomputation and layout, with chunks of logits of that size (MiB).

    The first pipeline stage holds as many micro-batches as there are stages; the last has the output layer.
    """
    model, layout, training = run.model, run.layout, run.training
    element = 2 if training.precision == "bf16" else 4
    shards = layout.context_parallel * (layout.tensor_parallel if layout.sequence_parallel else 1)
    copies = make_objective(run.objective, training).copies
    tokens = copies * training.micro_batch_size * training.sequence_length / shards * layout.pipeline_parallel
    modules = training.recompute_modules if training.recompute == "selective" else ()
    elements = [layer_elements(model, layer, modules) for layer in range(model.num_layers)]
    kept = sum(elements) / layout.pipeline_parallel
    if training.recompute == "full":
        kept = model.hidden_size * model.num_layers / layout.pipeline_parallel + max(elements)
    rows = training.micro_batch_size * training.sequence_length / shards
    logits = min(logits_chunk_mb * 2**20, rows * model.vocab_size / layout.tensor_parallel * 4)
    return ActivationMemory(tokens * kept * element, _LOGITS_COPIES * logits)
