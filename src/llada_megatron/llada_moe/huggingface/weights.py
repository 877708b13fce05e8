"""The weights of a model in canonical form: the names and whole shapes that they have in sharded checkpoints.

A conversion goes through units. A unit consists of one or a few tensors of a Hugging Face checkpoint: the query, key
and value projections of a layer, gate and up of one expert, a block of rows of the embedding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from llada_megatron.llada_moe.config.model import ModelConfig, MoEConfig

BLOCK_ELEMENTS = 16 * 2**20
"""Weights whose rows keep their order are cut into units of about this many elements (32 MB in bf16)."""

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
_LAYER = "decoder.layers.{layer}."
INPUT_NORM = _LAYER + "input_layernorm.weight"
QKV = _LAYER + "self_attention.linear_qkv.weight"
QUERY_NORM = _LAYER + "self_attention.q_layernorm.weight"
KEY_NORM = _LAYER + "self_attention.k_layernorm.weight"
PROJECTION = _LAYER + "self_attention.linear_proj.weight"
MLP_NORM = _LAYER + "pre_mlp_layernorm.weight"
DENSE_UP = _LAYER + "mlp.linear_fc1.weight"
DENSE_DOWN = _LAYER + "mlp.linear_fc2.weight"
ROUTER = _LAYER + "mlp.router.weight"
EXPERT_BIAS = _LAYER + "mlp.router.expert_bias"
EXPERT_UP = _LAYER + "mlp.experts.experts.linear_fc1.weight"
EXPERT_DOWN = _LAYER + "mlp.experts.experts.linear_fc2.weight"
SHARED_UP = _LAYER + "mlp.shared_experts.linear_fc1.weight"
SHARED_DOWN = _LAYER + "mlp.shared_experts.linear_fc2.weight"

VOCABULARY_ROWS = (EMBEDDING, OUTPUT)
"""The weights with one row per token, which alone may have padding rows at the end."""


@dataclass(frozen=True)
class Weight:
    """A weight of the whole model, or one weight of all experts of a layer, stacked."""

    pattern: str
    """One of the names above."""
    layer: int | None
    experts: int
    """Length of the leading expert axis; 0 = it has none."""
    shape: tuple[int, ...]
    """Its shape without the expert axis."""

    @property
    def key(self) -> str:
        """Its name in a sharded checkpoint."""
        return self.pattern if self.layer is None else self.pattern.format(layer=self.layer)

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Its shape in a sharded checkpoint."""
        return (self.experts, *self.shape) if self.experts else self.shape


@dataclass(frozen=True)
class Unit:
    """What is converted at once: rows [start, stop) of a weight, or of one expert of a weight with an expert axis."""

    weight: Weight
    expert: int | None
    start: int
    stop: int

    @property
    def index(self) -> tuple[int, ...]:
        """Its position on the expert axis; empty if the weight has none."""
        return () if self.expert is None else (self.expert,)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its tensor."""
        return (self.stop - self.start, *self.weight.shape[1:])

    @property
    def elements(self) -> int:
        """Number of elements of its tensor."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """Its name in messages: canonical name, expert, and the rows unless it has all of them."""
        expert = "" if self.expert is None else f"[{self.expert}]"
        whole = self.start == 0 and self.stop == self.weight.shape[0]
        return f"{self.weight.key}{expert}" + ("" if whole else f" rows {self.start} to {self.stop - 1}")


def canonical_weights(model: ModelConfig) -> Iterator[Weight]:
    """Every weight of `model`, in the order of the forward pass."""
    hidden = model.hidden_size
    yield Weight(EMBEDDING, None, 0, (model.vocab_size, hidden))
    for layer in range(model.num_layers):
        for pattern, experts, shape in _layer_weights(model, layer):
            yield Weight(pattern, layer, experts, shape)
    yield Weight(FINAL_NORM, None, 0, (hidden,))
    if not model.tie_embeddings:
        yield Weight(OUTPUT, None, 0, (model.vocab_size, hidden))


def units(model: ModelConfig) -> Iterator[Unit]:
    """Every unit of `model`, in the order of the forward pass; large weights are several units of some rows each."""
    for weight in canonical_weights(model):
        for expert in range(weight.experts) if weight.experts else (None,):
            for start, stop in _blocks(weight):
                yield Unit(weight, expert, start, stop)


def _blocks(weight: Weight) -> Iterator[tuple[int, int]]:
    rows, width = weight.shape[0], math.prod(weight.shape[1:])
    # rows of query, key and value change their order, so they stay one unit
    block = rows if weight.pattern == QKV else max(1, BLOCK_ELEMENTS // width)
    for start in range(0, rows, block):
        yield start, min(start + block, rows)


Described = tuple[str, int, tuple[int, ...]]
"""Pattern, number of experts and shape of a weight."""


def _layer_weights(model: ModelConfig, layer: int) -> Iterator[Described]:
    hidden, head = model.hidden_size, model.head_dim
    yield INPUT_NORM, 0, (hidden,)
    yield QKV, 0, ((model.num_attention_heads + 2 * model.num_key_value_heads) * head, hidden)
    if model.qk_norm:
        yield QUERY_NORM, 0, (head,)
        yield KEY_NORM, 0, (head,)
    yield PROJECTION, 0, (hidden, model.num_attention_heads * head)
    yield MLP_NORM, 0, (hidden,)
    if model.moe is None or layer < model.moe.leading_dense_layers:
        yield from _feed_forward(DENSE_UP, DENSE_DOWN, 0, model.ffn_hidden_size, hidden)
    else:
        yield from _expert_weights(model.moe, hidden)


def _expert_weights(moe: MoEConfig, hidden: int) -> Iterator[Described]:
    yield ROUTER, 0, (moe.num_experts, hidden)
    if moe.expert_bias:
        yield EXPERT_BIAS, 0, (moe.num_experts,)
    yield from _feed_forward(EXPERT_UP, EXPERT_DOWN, moe.num_experts, moe.expert_ffn_hidden_size, hidden)
    if moe.shared_expert_ffn_hidden_size:
        yield from _feed_forward(SHARED_UP, SHARED_DOWN, 0, moe.shared_expert_ffn_hidden_size, hidden)


def _feed_forward(up: str, down: str, experts: int, width: int, hidden: int) -> Iterator[Described]:
    yield up, experts, (2 * width, hidden)
    yield down, experts, (hidden, width)
