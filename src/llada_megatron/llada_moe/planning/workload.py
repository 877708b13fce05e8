"""What an estimate is made of: the sizes of a Transformer, how it is spread, and what one step does with it.

It says more than our own models can be (biases, causal attention, multi-head latent attention), so that the same
arithmetic is held against published measurements of other models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.trained_parts import adapts_experts
from llada_megatron.llada_moe.model.parameters import count_parameters, trained_parameters
from llada_megatron.llada_moe.objectives import make_objective

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.fp8 import FP8Config
    from llada_megatron.llada_moe.config.model import ModelConfig
    from llada_megatron.llada_moe.config.run import RunConfig
    from llada_megatron.llada_moe.model.patterns import AttentionPattern
    from llada_megatron.llada_moe.objectives import Objective

LOOKED_AT = 1000
"""Steps of a run whose attention pattern is asked for, at equal distances."""


@dataclass(frozen=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek): ranks of its projections, and head sizes with and without positions."""

    query_rank: int
    key_value_rank: int
    head: int
    position_head: int
    value_head: int


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Sizes of a Transformer, in features."""

    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    ffn: int
    vocab: int
    experts: int = 0
    top_k: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    leading_dense: int = 0
    qk_norm: bool = False
    gated: bool = True
    biases: bool = False
    layer_norm: bool = False
    """LayerNorm, with a bias; otherwise RMSNorm."""
    learned_positions: int = 0
    tied: bool = False
    dropout: bool = False
    latent: LatentAttention | None = None
    extra_heads: int = 0
    """Modules that predict further tokens, each a layer and the output layer once more."""

    @property
    def query_features(self) -> int:
        """Features of all query heads."""
        return self.heads * self.head_dim

    @property
    def key_features(self) -> int:
        """Features of all key heads, and of all value heads."""
        return self.key_heads * self.head_dim

    def key_features_of_rank(self, tensor: int) -> float:
        """Features of the key heads that one of `tensor` tensor ranks attends with, and of its value heads: a head is
        never cut, and where there are fewer than ranks, several ranks have the same."""
        return max(self.key_heads / tensor, 1) * self.head_dim

    @property
    def matrices(self) -> int:
        """Matrices of a feed-forward."""
        return 3 if self.gated else 2

    def has_experts(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) is MoE."""
        return self.experts > 0 and layer >= self.leading_dense


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Bytes of a parameter in each of its forms."""

    weight: float = 2.0
    """The mean over the model, where the layers' weights are in FP8 or not all are trained."""
    gradient: float = 4.0
    main: float = 4.0
    moments: float = 8.0
    gathered: float = 2.0
    """Bytes sent for each parameter by the gather after an update."""
    compute: str = "bf16"
    """What the products run in: bf16, fp8, mxfp8, nvfp4 or fp32."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One training step of a model under a layout."""

    stack: Stack
    layout: LayoutConfig
    sequence: int
    micro_batch: int
    micro_batches: int
    widths: Widths = field(default_factory=Widths)
    recompute: str = "none"
    """`none`, `full`, or `selective` with `modules`."""
    modules: frozenset[str] = frozenset()
    keys_per_query: float | None = None
    """Keys that a query sees on average; None = the whole sequence."""
    supervised: float = 1.0
    """Largest share of the rows that reach the output layer: memory must hold it."""
    supervised_mean: float = 1.0
    """Their mean share, which the time follows."""
    logit_bytes: float = 2.0
    """Bytes kept for each logit at once."""
    logits_limit: float = math.inf
    """Bytes of fp32 logits that exist at a time."""
    logits_again: bool = False
    """The logits are computed again in the backward pass."""
    imbalance: float = 1.0
    """Rows of the fullest expert rank over the mean."""
    layer_imbalance: tuple[float, ...] = ()
    """The same of each layer, where it was measured; empty = all are taken to have `imbalance`."""
    padded_rows: bool = False
    """Every expert gets exactly its capacity (factor 1)."""
    expert_gradients: bool = False
    """The gradients of all experts of a layer exist at once, in bf16, before they are added to the main gradients."""
    fused_accumulation: bool = True
    """Weight gradients are added to the main gradients inside the product, which keeps one dummy for each shape."""
    distributed_optimizer: bool = True
    overlap_exchange: bool = False
    """All-to-all of one micro-batch beside the products of another."""
    overlap_tensor: bool = False
    graphs: str = "none"
    """CUDA graphs: `none`, `part` (of each layer) or `all` (a whole iteration)."""
    fused_dispatch: bool = False
    """DeepEP or HybridEP in the place of NCCL and a sort."""
    gathered_keys: bool = False
    """Each context rank gathers and keeps the keys and values of the whole sequence; otherwise they go round."""

    @property
    def tokens(self) -> float:
        """Positions of a micro-batch on one context rank, before the tensor ranks share them."""
        return self.sequence * self.micro_batch / self.layout.context_parallel

    @property
    def sequence_shards(self) -> int:
        """Tensor ranks that share what lies between the projections."""
        return self.layout.tensor_parallel if self.layout.sequence_parallel else 1

    @property
    def keys(self) -> float:
        """Keys that a query sees on average."""
        return self.sequence if self.keys_per_query is None else self.keys_per_query

    def rows_per_token(self, layer: int) -> float:
        """Rows that arrive at the fullest expert rank of a layer (from 0) for each token that this rank holds."""
        if self.padded_rows:
            share = self.tokens / self.sequence_shards
            return math.ceil(share * self.stack.top_k / self.stack.experts) * self.stack.experts / share
        if self.layout.expert_parallel == 1:
            return self.stack.top_k  # every expert is here, and so are all rows
        return self.stack.top_k * (self.layer_imbalance[layer] if self.layer_imbalance else self.imbalance)

    @property
    def dense_copies(self) -> int:
        """Ranks that share the optimizer state of what is not an expert."""
        return self.layout.data_parallel * self.layout.context_parallel

    @property
    def expert_copies(self) -> int:
        """Ranks that share the optimizer state of the same experts."""
        layout = self.layout
        return max(
            1,
            self.dense_copies * layout.tensor_parallel // (layout.expert_parallel * layout.expert_tensor_parallel),
        )

    @cached_property
    def stage_layers(self) -> list[list[int]]:
        """Layers (from 0) of each pipeline stage, all its chunks together."""
        stages = self.layout.pipeline_parallel
        sizes = self.layout.chunk_layers(self.stack.layers)
        found: list[list[int]] = [[] for _ in range(stages)]
        first = 0
        for chunk, size in enumerate(sizes):
            found[chunk % stages].extend(range(first, first + size))
            first += size
        return found


def of_run(
    run: RunConfig,
    imbalance: float = 1.0,
    documents: float = 1.0,
    layer_imbalance: tuple[float, ...] = (),
    copies: int | None = None,
) -> Workload:
    """The workload of a run on GPUs with Transformer Engine.

    Args:
        run: its configuration.
        imbalance: rows of the fullest expert rank over the mean.
        documents: how many documents a window holds; each attends to itself only.
        layer_imbalance: the first of each layer, measured; empty = all have it.
        copies: how often a sequence holds its text, of which the output layer sees one; None = as in the largest steps.
    """
    training, moe = run.training, run.model.moe
    objective = make_objective(run.objective, training)
    copies = objective.copies if copies is None else copies
    length = training.sequence_length / documents
    pattern = pattern_with(objective, training.steps, copies)
    keys = length if pattern.block is None else pattern.keys_per_query(max(1, round(length)))
    chunk = (training.logits_chunk_mb or 2048) * 2**20
    own = own_experts(run)
    again = ["moe_act"] if own else []
    supervised = 1.0 if objective.verifies else 1 / copies
    positions = copies * training.sequence_length * training.micro_batch_size
    rows = supervised * positions / run.layout.context_parallel
    return Workload(
        stack=stack_of(run),
        layout=run.layout,
        sequence=copies * training.sequence_length,
        micro_batch=training.micro_batch_size,
        micro_batches=training.global_batch_size // (training.micro_batch_size * run.layout.data_parallel),
        widths=widths_of(run),
        recompute="selective" if again and training.recompute == "none" else training.recompute,
        modules=frozenset({*training.recompute_modules, *again}),
        keys_per_query=keys,
        supervised=supervised,
        supervised_mean=objective.supervised_share / copies,
        logit_bytes=12.0,
        logits_limit=3.0 * chunk,
        logits_again=4.0 * rows * run.model.vocab_size / run.layout.tensor_parallel > chunk,
        imbalance=imbalance if moe is not None else 1.0,
        layer_imbalance=layer_imbalance,
        gathered_keys=True,
        expert_gradients=own,
        fused_dispatch=run.layout.expert_dispatcher == "flex",
    )


def own_experts(run: RunConfig) -> bool:
    """Whether the routed experts are this project's grouped products.

    They compute their activation again in the backward pass, whatever is asked for, and have the gradients of a layer's
    experts at once. Those in FP8 and fp32 are Transformer Engine's, those with low-rank factors plain operations.
    """
    training = run.training
    plain = training.precision == "bf16" and training.fp8 is None and not adapts_experts(training)
    return run.model.moe is not None and plain


def steps_looked_at(steps: int) -> range:
    """At most `LOOKED_AT` of a run's steps (from 0), at equal distances."""
    return range(0, steps, math.ceil(steps / LOOKED_AT))


def pattern_with(objective: Objective, steps: int, copies: int) -> AttentionPattern:
    """Who attends to whom at the steps whose sequences hold their text `copies` times: of the last step where it is
    such a one, else of the first that is."""
    for step in (steps - 1, *steps_looked_at(steps)):
        pattern = objective.pattern(step)
        if pattern.copies == copies:
            return pattern
    raise ValueError(f"no step's sequences hold their text {copies} times")


def stack_of(run: RunConfig) -> Stack:
    """The sizes of a run's model."""
    model = run.model
    moe = model.moe
    experts: dict[str, int] = {}
    if moe is not None:
        experts = {
            "experts": moe.num_experts,
            "top_k": moe.top_k,
            "expert_ffn": moe.expert_ffn_hidden_size,
            "shared_ffn": moe.shared_expert_ffn_hidden_size,
            "leading_dense": moe.leading_dense_layers,
        }
    return Stack(
        layers=model.num_layers,
        hidden=model.hidden_size,
        heads=model.num_attention_heads,
        key_heads=model.num_key_value_heads,
        head_dim=model.head_dim,
        ffn=model.ffn_hidden_size,
        vocab=model.vocab_size,
        qk_norm=model.qk_norm,
        tied=model.tie_embeddings,
        **experts,
    )


MOMENT_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0}


def widths_of(run: RunConfig) -> Widths:
    """Bytes of each form of a parameter under a run's precision and optimizer: where it trains a part of the weights
    or low-rank factors, the mean over the model."""
    whole = _widths_of_trained(run)
    trained = trained_parameters(run.model, run.training)
    share = trained / count_parameters(run.model).trainable
    if share == 1:
        return whole
    return replace(
        whole,
        weight=whole.weight * (1 + share * (run.training.lora is not None)),
        gradient=whole.gradient * share,
        main=whole.main * share,
        moments=whole.moments * share,
        gathered=whole.gathered * share,
    )


def _widths_of_trained(run: RunConfig) -> Widths:
    optimizer, fp8 = run.optimizer, run.training.fp8
    moments = MOMENT_BYTES[optimizer.exp_avg_dtype] + MOMENT_BYTES[optimizer.exp_avg_sq_dtype]
    if run.training.precision == "fp32":
        return Widths(weight=4.0, gradient=4.0, main=0.0, moments=8.0, gathered=4.0, compute="fp32")
    compute = "bf16" if fp8 is None else ("mxfp8" if fp8.recipe == "mxfp8" else "fp8")
    weight = 1.0 + share_in_bf16(run.model, fp8) if fp8 is not None and fp8.param_gather else 2.0
    gradient = 4.0 if optimizer.main_grads_dtype == "fp32" else 2.0
    return Widths(weight=weight, gradient=gradient, moments=moments, gathered=weight, compute=compute)


def share_in_bf16(model: ModelConfig, fp8: FP8Config) -> float:
    """Share of a model's parameters that stay in bf16 where the weights of its layers are kept in FP8: embedding,
    output layer, and the layers that `training.fp8` leaves out; routers and norms are not counted."""
    total = count_parameters(model).trainable
    tables = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    left_out = (fp8.num_layers_at_start_in_bf16 + fp8.num_layers_at_end_in_bf16) / model.num_layers
    return (tables + left_out * (total - tables)) / total
