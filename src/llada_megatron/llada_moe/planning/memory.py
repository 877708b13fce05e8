"""Memory of a rank at its fullest, part by part, for each pipeline stage."""

from __future__ import annotations

from dataclasses import dataclass

from llada_megatron.llada_moe.planning.activations import element, in_flight, kept_of_layer, working_set
from llada_megatron.llada_moe.planning.held_parameters import Held, stage_parameters, state_bytes
from llada_megatron.llada_moe.planning.workload import Workload

WORKSPACES = 0.1 * 2**30
"""Fixed tensors of a process: workspaces of cuBLAS and Transformer Engine, masks, random states. Nine published small
GPT runs on H100 lie 0.08 to 0.12 GiB above all other parts."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes of one rank of a pipeline stage."""

    stage: int
    parts: dict[str, float]

    @property
    def allocated(self) -> float:
        """The largest sum of live tensors, as `torch.cuda.max_memory_allocated` counts it."""
        return sum(self.parts.values())


def memory_by_stage(workload: Workload, held: list[Held] | None = None) -> list[StageMemory]:
    """Of every stage. `held`: parameters of a rank of each, counted in the real model; None = from the sizes."""
    stages = range(workload.layout.pipeline_parallel)
    return [
        stage_memory(workload, stage, stage_parameters(workload, stage) if held is None else held[stage])
        for stage in stages
    ]


def fullest(stages: list[StageMemory]) -> StageMemory:
    """The stage whose ranks need most."""
    return max(stages, key=lambda stage: stage.allocated)


def stage_memory(workload: Workload, stage: int, held: Held) -> StageMemory:
    """Of one rank of a stage that holds these parameters."""
    layers = workload.stage_layers[stage]
    kept = sum(kept_of_layer(workload, layer) for layer in layers)
    last = stage == workload.layout.pipeline_parallel - 1
    logits = logits_bytes(workload) if last else 0.0
    parts = state_bytes(workload, held) | {
        "activations": kept * in_flight(workload, stage),
        "layer at work": max((layer_at_work(workload, layer) for layer in layers), default=0.0),
        "all-to-all": max((exchange_buffers(workload, layer) for layer in layers), default=0.0),
        "logits": logits,
        "recomputed layer": max(0.0, layer_run_again(workload, layers) - logits),  # the logits are gone by then
        "gradient dummies": dummies(workload, layers) if workload.fused_accumulation else 0.0,
        "workspaces": WORKSPACES,
    }
    return StageMemory(stage, parts)


def layer_at_work(workload: Workload, layer: int) -> float:
    """Gradients of a layer's widest tensors, beside what it keeps."""
    stack, size, tensor = workload.stack, element(workload), workload.layout.tensor_parallel
    wide = (stack.matrices - 1) * stack.ffn / tensor
    if stack.has_experts(layer):
        rows = workload.rows_per_token(layer) / workload.sequence_shards
        wide = max((stack.matrices - 1) * rows * stack.expert_ffn, (stack.matrices - 1) * stack.shared_ffn / tensor)
    return workload.tokens * size * (wide + stack.hidden)


def layer_run_again(workload: Workload, layers: list[int]) -> float:
    """What the widest layer keeps while it is run again, one layer at a time, beyond what it keeps anyway."""
    if workload.recompute == "full":
        return max((working_set(workload, layer) for layer in layers), default=0.0)
    if "moe" in workload.modules:
        return max((working_set(workload, n) - kept_of_layer(workload, n) for n in layers), default=0.0)
    return 0.0


def exchange_buffers(workload: Workload, layer: int) -> float:
    """Rows of a MoE layer on both sides of an all-to-all, alive together."""
    stack = workload.stack
    if not stack.has_experts(layer) or workload.layout.expert_parallel == 1:
        return 0.0
    rows = workload.rows_per_token(layer) / workload.sequence_shards
    sent = stack.top_k / workload.sequence_shards
    return workload.tokens * element(workload) * stack.hidden * (rows + sent)


def logits_bytes(workload: Workload) -> float:
    """What the output layer and the loss hold at once, and the hidden states before and after the final norm."""
    stack, tensor = workload.stack, workload.layout.tensor_parallel
    rows = workload.tokens * workload.supervised
    logits = min(rows * stack.vocab / tensor * workload.logit_bytes, workload.logits_limit)
    hidden = 2 * element(workload) * workload.tokens * stack.hidden / workload.sequence_shards
    again = 2 * 2 * stack.vocab * stack.hidden / tensor if workload.logits_again else 0.0
    return logits + hidden + again


def dummies(workload: Workload, layers: list[int]) -> float:
    """One weight-shaped bf16 buffer for each distinct shape of a weight whose gradient is added inside the product, and
    those of a layer's experts where they exist at once."""
    stack, tensor = workload.stack, workload.layout.tensor_parallel
    shapes = {("qkv", stack.hidden * (stack.query_features + 2 * stack.key_features) // tensor)}
    shapes.add(("output", stack.hidden * stack.query_features // tensor))
    if any(not stack.has_experts(layer) for layer in layers):
        shapes.add(("dense", stack.matrices * stack.hidden * stack.ffn // tensor))
    if workload.expert_gradients and any(map(stack.has_experts, layers)):
        ranks = workload.layout.expert_parallel * workload.layout.expert_tensor_parallel
        shapes.add(("experts", stack.experts * stack.matrices * stack.hidden * stack.expert_ffn // ranks))
    return 2.0 * sum(size for _, size in shapes)
