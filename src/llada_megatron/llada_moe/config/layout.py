"""How a model is spread over ranks: the keys of `layout`, and which layouts a model can have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.parsing import Refuse


@dataclass(frozen=True, kw_only=True)
class LayoutConfig:
    """How the model is spread over ranks. World size = tensor * pipeline * context * data."""

    tensor_parallel: int = 1
    sequence_parallel: bool = False
    pipeline_parallel: int = 1
    pipeline_chunks_per_rank: int = 1
    """More than 1 = interleaved schedule."""
    pipeline_layers: list[int] | None = None
    """Layers of each pipeline stage, or with chunks of each chunk, in the order of the layers; null = equally many. The
    last stage also computes the output layer and the loss: with fewer layers there the others wait less."""
    context_parallel: int = 1
    data_parallel: int = 1
    expert_parallel: int = 1
    expert_tensor_parallel: int = 1
    expert_dispatcher: Literal["alltoall", "allgather", "flex"] = "alltoall"
    """flex = the kernels of `flex_backend` send each token once to each rank that needs it (CUDA and DeepEP only)."""
    flex_backend: Literal["deepep", "hybridep"] = "deepep"
    """Package whose kernels `expert_dispatcher: flex` uses: DeepEP, or the HybridEP that is a branch of it."""
    overlap_shared_experts: bool = False
    """Compute the shared expert while the tokens of the routed experts travel (expert_dispatcher alltoall)."""
    overlap_grad_reduce: bool = False
    """Reduce the gradients of a bucket of weights over data-parallel ranks while the last backward pass goes on."""
    overlap_param_gather: bool = False
    """Gather updated weights bucket by bucket while the next forward pass goes on; needs overlap_grad_reduce."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tensor_parallel * self.pipeline_parallel * self.context_parallel * self.data_parallel

    def chunk_layers(self, num_layers: int) -> list[int]:
        """How many layers each pipeline stage holds, or each interleaved chunk, in the order of the layers."""
        if self.pipeline_layers is not None:
            return self.pipeline_layers
        chunks = self.pipeline_parallel * self.pipeline_chunks_per_rank
        return [num_layers // chunks] * chunks


def divisors(number: int) -> list[int]:
    """Every positive divisor of `number`, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]


def data_parallel_for_experts(tensor: int, expert: int, expert_tensor: int) -> int:
    """The fewest data-parallel ranks with which these axes can be laid out: the expert axes divide tensor x data."""
    experts = expert * expert_tensor
    return experts // max(1, math.gcd(experts, tensor))


def check_layout(model: ModelConfig, layout: LayoutConfig, refuse: Refuse) -> None:
    """Every axis of the layout against the model."""
    sizes = [name for name, value in vars(layout).items() if isinstance(value, int) and not isinstance(value, bool)]
    wrong = [name for name in sizes if getattr(layout, name) < 1]
    for name in wrong:
        refuse(f"layout.{name}", f"{getattr(layout, name)} must be at least 1")
    if wrong:
        return
    check_tensor(model, layout, refuse)
    check_pipeline(model.num_layers, layout, refuse)
    check_experts(model, layout, refuse)
    check_overlap(model, layout, refuse)


def tensor_obstacle(model: ModelConfig, size: int) -> str | None:
    """Why the model cannot be cut into `size` tensor-parallel parts; None when it can."""
    widths = {
        "num_attention_heads": model.num_attention_heads,
        "vocab_size": model.vocab_size,
        "ffn_hidden_size": model.ffn_hidden_size,
    }
    if model.moe and model.moe.shared_expert_ffn_hidden_size:
        widths["moe.shared_expert_ffn_hidden_size"] = model.moe.shared_expert_ffn_hidden_size
    for name, width in widths.items():
        if width % size:
            return f"{size} does not divide {name} {width}"
    # Fewer key/value heads than ranks: Megatron gives several ranks the same head, whole groups of ranks per head.
    if model.num_key_value_heads % size and size % model.num_key_value_heads:
        return f"{size} neither divides num_key_value_heads {model.num_key_value_heads} nor is a multiple of it"
    return None


def check_tensor(model: ModelConfig, layout: LayoutConfig, refuse: Refuse) -> None:
    """Tensor and sequence parallelism."""
    obstacle = tensor_obstacle(model, layout.tensor_parallel)
    if obstacle:
        usable = [size for size in divisors(max(model.num_attention_heads, 1)) if not tensor_obstacle(model, size)]
        refuse("layout.tensor_parallel", f"{obstacle}; use one of {', '.join(map(str, usable))}")
    if layout.sequence_parallel and layout.tensor_parallel == 1:
        refuse(
            "layout.sequence_parallel",
            "true needs tensor_parallel > 1 (it cuts the sequence over the tensor-parallel ranks)",
        )
    if model.moe and layout.tensor_parallel > 1 and not layout.sequence_parallel:
        refuse(
            "layout.sequence_parallel",
            f"a MoE model with tensor_parallel {layout.tensor_parallel} trains only with sequence_parallel: true",
        )


def check_pipeline(layers: int, layout: LayoutConfig, refuse: Refuse) -> None:
    """Pipeline stages and their chunks, against the number of layers."""
    stages, chunks = layout.pipeline_parallel, layout.pipeline_chunks_per_rank
    if chunks > 1 and stages == 1:
        refuse("layout.pipeline_chunks_per_rank", f"{chunks} needs pipeline_parallel > 1")
        return
    if layout.pipeline_layers is not None:
        _check_pipeline_layers(layers, layout, layout.pipeline_layers, refuse)
    elif layers % stages:
        usable = ", ".join(map(str, divisors(layers)))
        refuse(
            "layout.pipeline_parallel",
            f"{stages} does not divide num_layers {layers}; use one of {usable}, or say the layers of each stage in "
            "layout.pipeline_layers",
        )
    elif layers % (stages * chunks):
        usable = ", ".join(map(str, divisors(layers // stages)))
        refuse(
            "layout.pipeline_chunks_per_rank",
            f"pipeline_parallel {stages} x {chunks} chunks = {stages * chunks} does not divide num_layers "
            f"{layers}; use one of {usable}",
        )


def _check_pipeline_layers(layers: int, layout: LayoutConfig, parts: list[int], refuse: Refuse) -> None:
    """As many numbers as stages times chunks, each at least 1, together all layers."""
    stages, chunks = layout.pipeline_parallel, layout.pipeline_chunks_per_rank
    if stages == 1:
        refuse("layout.pipeline_layers", f"{parts} needs pipeline_parallel > 1")
    elif len(parts) != stages * chunks:
        refuse(
            "layout.pipeline_layers",
            f"{parts} has {len(parts)} numbers, but pipeline_parallel {stages} x pipeline_chunks_per_rank {chunks} = "
            f"{stages * chunks}",
        )
    elif min(parts) < 1:
        refuse("layout.pipeline_layers", f"{parts}: every stage holds at least 1 layer")
    elif sum(parts) != layers:
        refuse("layout.pipeline_layers", f"{parts} are {sum(parts)} layers, but num_layers is {layers}")


def check_overlap(model: ModelConfig, layout: LayoutConfig, refuse: Refuse) -> None:
    """What is computed while something else is sent."""
    shared = model.moe.shared_expert_ffn_hidden_size if model.moe else 0
    if layout.overlap_shared_experts and not shared:
        refuse("layout.overlap_shared_experts", "true, but the model has no shared expert")
    elif layout.overlap_shared_experts and layout.expert_dispatcher != "alltoall":
        refuse(
            "layout.overlap_shared_experts",
            f"true works with expert_dispatcher alltoall only, not with {layout.expert_dispatcher}",
        )
    if layout.overlap_param_gather and not layout.overlap_grad_reduce:
        refuse(
            "layout.overlap_param_gather",
            "true needs overlap_grad_reduce: true (only then are there several buckets to gather)",
        )
    if layout.expert_dispatcher == "flex" and layout.tensor_parallel * layout.expert_parallel == 1:
        refuse(
            "layout.expert_dispatcher", "flex sends tokens to other ranks, but tensor_parallel x expert_parallel is 1"
        )


def check_experts(model: ModelConfig, layout: LayoutConfig, refuse: Refuse) -> None:
    """Expert and expert-tensor parallelism."""
    expert, expert_tensor = layout.expert_parallel, layout.expert_tensor_parallel
    if model.moe is None:
        for name, size in (("expert_parallel", expert), ("expert_tensor_parallel", expert_tensor)):
            if size > 1:
                refuse(f"layout.{name}", f"{size}, but the model has no experts; use 1")
        return
    if model.moe.num_experts % expert:
        usable = ", ".join(map(str, divisors(model.moe.num_experts)))
        refuse(
            "layout.expert_parallel",
            f"{expert} does not divide num_experts {model.moe.num_experts}; use one of {usable}",
        )
    if model.moe.expert_ffn_hidden_size % expert_tensor:
        refuse(
            "layout.expert_tensor_parallel",
            f"{expert_tensor} does not divide expert_ffn_hidden_size {model.moe.expert_ffn_hidden_size}",
        )
    ranks = layout.tensor_parallel * layout.context_parallel * layout.data_parallel
    if ranks % (expert * expert_tensor):
        refuse(
            "layout.expert_parallel",
            f"expert_parallel {expert} x expert_tensor_parallel {expert_tensor} = {expert * expert_tensor} does "
            "not divide the ranks of one "
            f"pipeline stage, tensor {layout.tensor_parallel} x context {layout.context_parallel} x data "
            f"{layout.data_parallel} = {ranks}; "
            f"expert parallelism uses these ranks, it does not add any (raise data_parallel)",
        )
