"""Seconds of a training step on a kind of GPU, part by part: a roofline with shares of the data sheet.

Each layer costs its operations over the rate that its products reach, the bytes that it moves over the rate of the
memory, and what it sends over that of the link or the network; but never less than the host needs to give that work.
The slowest pipeline stage sets
the pace; the others wait.
"""

from __future__ import annotations

from dataclasses import dataclass

from llada_megatron.llada_moe.planning.gpu_sheet import GpuSheet
from llada_megatron.llada_moe.planning.held_parameters import stage_parameters
from llada_megatron.llada_moe.planning.workload import Workload

FIXED_S, STEP_S = 24e-6, 7e-6
"""Latency of a collective, and of each further rank of its ring (SimuMax on B200: 22 to 26, and 5.5 to 9.2)."""
HALF_WIDTH = 256
"""Columns of a matrix on one rank at which its product reaches half of the share of a wide one; an assumption."""
HIDDEN_TENSOR = 0.6
"""Part of tensor parallelism's messages that is hidden where they are overlapped."""
HIDDEN_EXCHANGE = 0.8
"""Part of the all-to-all that is hidden where another micro-batch is computed beside it."""
GRAPH_HOST = {"none": 1.0, "part": 0.6, "all": 0.1}
"""Part of the host's time that is left with CUDA graphs."""
SORTED, FUSED_SORTED = 12, 8
"""Times that the rows of experts are read or written on the way there and back, forward and backward."""
UPDATE_BYTES = 32
"""Moved for each parameter of a shard by clipping and Adam."""
MOVED_HALF = frozenset({"exchange", "permutation", "elementwise", "tensor parallel", "context parallel"})
"""Parts of which a forward pass is half; it is a third of the products."""

Parts = dict[str, float]


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: by part, and of one micro-batch on each stage."""

    parts: Parts
    stages: list[float]

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(self.parts.values())


def step_time(workload: Workload, gpu: GpuSheet) -> StepTime:
    """The step's parts: those of the slowest stage, its waits, and what data parallelism does not hide."""
    layout = workload.layout
    layers = layer_times(workload, gpu)
    stages = [_stage_time(workload, gpu, stage, layers) for stage in range(layout.pipeline_parallel)]
    slowest = max(stages, key=_total)
    parts = {name: workload.micro_batches * seconds for name, seconds in slowest.items()}
    bubbles = layout.pipeline_parallel - 1
    mean = sum(_total(stage) for stage in stages) / len(stages)
    parts["bubble"] = bubbles / layout.pipeline_chunks_per_rank * mean
    parts |= _data_parallel(workload, gpu, _total(slowest))
    return StepTime({name: seconds for name, seconds in parts.items() if seconds > 0}, [_total(s) for s in stages])


def layer_times(workload: Workload, gpu: GpuSheet) -> list[Parts]:
    """Of every layer; layers of one kind and load are computed once."""
    stack = workload.stack
    kinds = [workload.rows_per_token(layer) if stack.has_experts(layer) else 0.0 for layer in range(stack.layers)]
    times = {kind: layer_time(workload, gpu, kinds.index(kind)) for kind in set(kinds)}
    return [times[kind] for kind in kinds]


def layer_time(workload: Workload, gpu: GpuSheet, layer: int) -> Parts:
    """Seconds of one micro-batch through a layer (from 0), forward and backward; what is run again is a part of its
    own."""
    stack, layout, moe = workload.stack, workload.layout, workload.stack.has_experts(layer)
    tokens, hidden = workload.tokens / layout.tensor_parallel, stack.hidden
    rate, compute = gpu.peak(workload.widths.compute), workload.widths.compute
    width = stack.shared_ffn if moe else stack.ffn
    queries, keys = stack.query_features, stack.key_features
    values = queries
    projections = 2 * hidden * (queries + keys)
    if stack.latent is not None:
        latent = stack.latent
        size = latent.head + latent.position_head
        queries, values = stack.heads * size, stack.heads * latent.value_head
        projections = hidden * (latent.query_rank + latent.key_value_rank + latent.position_head)
        projections += (latent.query_rank or hidden) * queries + values * hidden
        projections += latent.key_value_rank * stack.heads * (latent.head + latent.value_head)
        keys = queries
    cast = 1.0 if compute in ("bf16", "fp32") else 1.3
    moved = 2 * tokens * (cast * 24 * hidden + 10 * (queries + keys)) + 2 * cast * 8 * tokens * width
    narrow = _by_width(width / layout.tensor_parallel)
    parts = {
        "projections": 6 * projections * tokens / (rate * _by_width((queries + 2 * keys) / layout.tensor_parallel)),
        "attention": 6 * workload.keys * (queries + values) * tokens / (gpu.bf16_tflops * 1e12 * gpu.attention_share),
        "feed-forward": 6 * stack.matrices * hidden * width * tokens / (rate * narrow),
        "tensor parallel": _tensor_parallel(workload, gpu, moe),
    }
    if layout.context_parallel > 1:
        parts["context parallel"] = _context_parallel(workload, gpu)
    if moe:
        parts |= _experts(workload, gpu, rate, layer)
        moved += 2 * cast * 8 * tokens * workload.rows_per_token(layer) * stack.expert_ffn
    parts["elementwise"] = moved / gpu.memory_rate
    parts["recomputed"] = _recomputed(workload, parts, moe)
    host = (gpu.moe_host_us if moe else gpu.dense_host_us) * 1e-6 * GRAPH_HOST[workload.graphs]
    parts["host"] = max(0.0, host - _total(parts))
    return parts


def _by_width(width: float) -> float:
    """Share of the rate of a wide matrix that one of so many columns reaches."""
    return width / (width + HALF_WIDTH) if width else 1.0


def _experts(workload: Workload, gpu: GpuSheet, rate: float, layer: int) -> Parts:
    stack, layout = workload.stack, workload.layout
    tokens = workload.tokens / layout.tensor_parallel
    rows = tokens * workload.rows_per_token(layer)
    each = workload.tokens / workload.sequence_shards * stack.top_k * layout.expert_parallel / stack.experts
    each *= layout.expert_tensor_parallel
    share = each / (each + gpu.grouped_half_rows)
    per_row = stack.matrices * stack.hidden * stack.expert_ffn
    passes = FUSED_SORTED if workload.fused_dispatch else SORTED
    sent = 4 * 2 * stack.hidden * rows * exchange_seconds_per_byte(workload, gpu)
    sent += 4 * FIXED_S * (layout.expert_parallel > 1)
    return {
        "experts": 6 * rows * per_row / (rate * share),
        "router": 6 * tokens * stack.hidden * stack.experts / (gpu.bf16_tflops * 1e12 * 0.1),
        "exchange": sent * (1 - HIDDEN_EXCHANGE * workload.overlap_exchange),
        "permutation": passes * 2 * stack.hidden * rows / gpu.memory_rate,
    }


def exchange_seconds_per_byte(workload: Workload, gpu: GpuSheet) -> float:
    """Of an all-to-all among expert ranks: what is for other nodes goes over the network, with DeepEP and HybridEP
    once for each node."""
    ranks = workload.layout.expert_parallel * workload.layout.expert_tensor_parallel
    inside = min(ranks, gpu.gpus_per_node)
    outside = (ranks - inside) / ranks
    if workload.fused_dispatch and outside:
        nodes = ranks / inside
        visited = nodes * (1 - (1 - 1 / nodes) ** workload.stack.top_k)
        outside *= min(1.0, visited / workload.stack.top_k)
    return (inside - 1) / ranks / gpu.link_rate + outside / gpu.network_rate


def _tensor_parallel(workload: Workload, gpu: GpuSheet, moe: bool) -> float:
    """Ten collectives of a dense layer, forward and backward; half of them where the feed-forward is routed."""
    layout, stack = workload.layout, workload.stack
    if layout.tensor_parallel == 1:
        return 0.0
    collectives = 10 if not moe or stack.shared_ffn else 5
    others = (layout.tensor_parallel - 1) / layout.tensor_parallel
    rate = gpu.link_rate if layout.tensor_parallel <= gpu.gpus_per_node else gpu.network_rate
    seconds = collectives * 2 * stack.hidden * workload.tokens * others / rate
    seconds += collectives * (FIXED_S + STEP_S * (layout.tensor_parallel - 1))
    return seconds * (1 - HIDDEN_TENSOR * workload.overlap_tensor)


def _context_parallel(workload: Workload, gpu: GpuSheet) -> float:
    """Keys and values of all shards gathered, and their gradients scattered."""
    layout, ranks = workload.layout, workload.layout.context_parallel
    shard = 2 * 2 * workload.stack.key_features_of_rank(layout.tensor_parallel) * workload.tokens
    near = ranks * layout.tensor_parallel <= gpu.gpus_per_node
    seconds = 2 * shard * (ranks - 1) / (gpu.link_rate if near else gpu.network_rate)
    return seconds + 2 * (FIXED_S + STEP_S * (ranks - 1))


def _recomputed(workload: Workload, parts: Parts, moe: bool) -> float:
    if workload.recompute == "none":
        return 0.0
    again = set(parts)
    if workload.recompute == "selective":
        routed = {"experts", "router", "feed-forward", "exchange", "permutation"} if moe else set()
        of_module = {"core_attn": {"attention"}, "shared_experts" if moe else "mlp": {"feed-forward"}, "moe": routed}
        again = set().union(*(of_module.get(name, set()) for name in workload.modules))
    seconds = sum(parts.get(name, 0.0) / (2 if name in MOVED_HALF else 3) for name in again)
    seconds += 0.15 * parts["elementwise"] * len({"moe_act", "layernorm"} & workload.modules)
    return seconds + parts["projections"] / 6 * ("mla_up_proj" in workload.modules)


def _stage_time(workload: Workload, gpu: GpuSheet, stage: int, times: list[Parts]) -> Parts:
    """Seconds of one micro-batch on a stage, all its chunks together."""
    layout, stack = workload.layout, workload.stack
    last = stage == layout.pipeline_parallel - 1
    layers = workload.stage_layers[stage] + [stack.layers - 1] * (stack.extra_heads * last)
    parts: Parts = {}
    for layer in layers:
        for name, seconds in times[layer].items():
            parts[name] = parts.get(name, 0.0) + seconds
    held = stage_parameters(workload, stage)
    added = 2 * workload.widths.gradient if workload.fused_accumulation else 2 * workload.widths.gradient + 4
    parts["accumulation"] = added * (held.dense + held.experts) / gpu.memory_rate
    if last:
        parts["head"] = head_time(workload, gpu) * (1 + stack.extra_heads)
    if layout.pipeline_parallel > 1:
        sent = 2 * 2 * workload.tokens * stack.hidden / workload.sequence_shards * layout.pipeline_chunks_per_rank
        reach = layout.tensor_parallel * layout.context_parallel * layout.data_parallel
        rate = gpu.link_rate if reach * layout.pipeline_parallel <= gpu.gpus_per_node else gpu.network_rate
        hidden = 0.5 if layout.pipeline_chunks_per_rank > 1 else 0.0
        parts["pipeline messages"] = sent * (1 - hidden) / rate
    return parts


def head_time(workload: Workload, gpu: GpuSheet) -> float:
    """Output layer and loss of one micro-batch, in bf16."""
    rows = workload.tokens * workload.supervised_mean * workload.stack.vocab / workload.layout.tensor_parallel
    products = (8 if workload.logits_again else 6) * rows * workload.stack.hidden
    moved = 24 if workload.logits_again else 12
    return products / (gpu.bf16_tflops * 1e12 * gpu.gemm_share) + moved * rows / gpu.memory_rate


def _data_parallel(workload: Workload, gpu: GpuSheet, micro_batch: float) -> Parts:
    """Reduction of gradients and gather of weights, as far as nothing hides them, and the update."""
    layout, widths = workload.layout, workload.widths
    held = max(
        (stage_parameters(workload, stage) for stage in range(layout.pipeline_parallel)),
        key=lambda each: each.dense + each.experts,
    )
    groups = (
        (held.dense, workload.dense_copies, layout.tensor_parallel),
        (held.experts, workload.expert_copies, layout.expert_parallel * layout.expert_tensor_parallel),
    )
    per_byte = sum(count * _ring_seconds(ranks, stride, gpu) for count, ranks, stride in groups)
    reduce, gather = widths.gradient * per_byte, widths.gathered * per_byte
    shards = sum(count / ranks for count, ranks, _ in groups)
    exposed = max(0.0, reduce - layout.overlap_grad_reduce * micro_batch * 2 / 3)
    exposed += max(0.0, gather - layout.overlap_param_gather * micro_batch / 3)
    return {"data parallel": exposed, "update": UPDATE_BYTES * shards / gpu.memory_rate}


def _ring_seconds(ranks: int, stride: int, gpu: GpuSheet) -> float:
    """Of a byte that `ranks` ranks reduce or gather, each `stride` after the one before; the rings of a node share its
    adapters."""
    if ranks == 1:
        return 0.0
    near = max(1.0, gpu.gpus_per_node / stride)
    if ranks <= near:
        return (ranks - 1) / ranks / gpu.link_rate
    return (ranks - 1) / ranks / min(gpu.link_rate, gpu.network_rate * near)


def _total(parts: Parts) -> float:
    return sum(parts.values())
