"""How long a run is, and how large its steps: the keys of `training`, and what does not fit the layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from llada_megatron.llada_moe.config.fp8 import FP8Config
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.parsing import Refuse
from llada_megatron.llada_moe.config.trained_parts import FrozenPart, LoRAConfig

RecomputedModule = Literal["core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts"]
"""Megatron's names of what selective recomputation can run again, of those that our models have."""


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
    fp8: FP8Config | None = None
    lora: LoRAConfig | None = None
    frozen: list[FrozenPart] = field(default_factory=list)
    """Parts whose weights stay as they are: embedding, output_layer, attention, mlp, router (and its expert biases),
    experts, shared_experts, norms."""
    recompute: Literal["none", "full", "selective"] = "none"
    """full = keep only each layer's input, run the layer again in the backward pass; selective = only the parts that
    recompute_modules names."""
    recompute_modules: list[RecomputedModule] = field(default_factory=list)
    """core_attn: attention without its projections; layernorm: outputs of norms (with Transformer Engine); mlp: dense
    feed-forwards; moe: all of a MoE layer but its input; moe_act: activations of routed experts; shared_experts."""
    logits_chunk_mb: int | None = None
    """The output layer and loss run over row chunks whose fp32 logits on one rank take at most this much memory; null =
    256 on a CPU, 2048 on a GPU."""

    def without_fp8(self) -> TrainingConfig:
        """The same, with every product in `precision`: what evaluates a model, whatever trained it."""
        return replace(self, fp8=None)


def check_batch(training: TrainingConfig, model: ModelConfig, layout: LayoutConfig, refuse: Refuse) -> None:
    """Sequence length and batch sizes against the model and the layout."""
    positive = ("steps", "sequence_length", "global_batch_size", "micro_batch_size", "logits_chunk_mb")
    wrong = [key for key in positive if (value := getattr(training, key)) is not None and value < 1]
    for key in wrong:
        refuse(f"training.{key}", f"{getattr(training, key)} must be at least 1")
    if not 0 <= training.seed < 2**32:
        refuse("training.seed", f"{training.seed} must lie between 0 and {2**32 - 1}")
    check_recompute(training, model, layout, refuse)
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


def check_recompute(training: TrainingConfig, model: ModelConfig, layout: LayoutConfig, refuse: Refuse) -> None:
    """Modules are named where, and only where, they are run again, and the model has each of them."""
    modules = training.recompute_modules
    if training.recompute != "selective":
        if modules:
            refuse("training.recompute_modules", f"{', '.join(modules)} needs recompute: selective")
        return
    if not modules:
        refuse("training.recompute", "selective needs the modules in training.recompute_modules, such as [moe_act]")
    for module in dict.fromkeys(modules):
        obstacle = _recompute_obstacle(module, modules, model, layout)
        if obstacle:
            refuse("training.recompute_modules", f"{module}: {obstacle}")


def _recompute_obstacle(
    module: RecomputedModule, modules: list[RecomputedModule], model: ModelConfig, layout: LayoutConfig
) -> str | None:
    """Why a module cannot be run again alone, or never would be; None when it can."""
    moe = model.moe
    if modules.count(module) > 1:
        return "named twice"
    if module in ("moe", "moe_act", "shared_experts") and moe is None:
        return "the model has no experts"
    if module == "mlp" and moe is not None and moe.leading_dense_layers == 0:
        return "every layer of the model is MoE, and mlp is the feed-forward of dense layers"
    if module in ("moe_act", "shared_experts") and "moe" in modules:
        return "moe runs it again already"
    if module == "moe" and moe is not None and moe.expert_capacity and layout.pipeline_parallel > 1:
        return "with model.moe.expert_capacity and pipeline stages, the router would route by another batch's documents"
    if module == "shared_experts" and moe is not None and not moe.shared_expert_ffn_hidden_size:
        return "the model has no shared expert"
    if module == "shared_experts" and layout.overlap_shared_experts:
        return "does not go together with layout.overlap_shared_experts (Megatron runs its parts between messages)"
    return None
