"""Memory and step time of a run on H100s, estimated from shapes: what the run files in configs/runs are set by.

    python -m benchmarks.roofline                             the four published models
    python -m benchmarks.roofline RUN [key.path=value …]      one run, with changes

Nothing here was measured. Rates and the formulas' constants are below, each with what it rests on.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, replace

from llada_megatron.cli import guarded
from llada_megatron.llada_moe.config import load_run
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.model.flops import flops_per_token
from llada_megatron.llada_moe.model.parameters import BUFFERS, layer_parameters, stage_layers

RUNS = ("llada-8b-pretrain", "llada-moe-7b-a1b-pretrain", "llada2-mini-pretrain", "llada2-flash-pretrain")
DOCUMENTS = (1, 8, 40)

CARD = 85.0e9
"""Bytes of an H100 of 80 GB that a process can have (79.2 GiB)."""
PEAK = 989e12
"""Dense bf16 operations a second by the data sheet; utilisation is stated against it."""
GEMM = 0.62
"""Share of PEAK that large products reach (usual figures for H100: 0.6 to 0.7)."""
GROUPED = {128: 0.21, 256: 0.30, 512: 0.40, 1024: 0.48, 2048: 0.54, 4096: 0.58, 8192: 0.62}
"""Share of PEAK by rows for each expert. Rests on published tables of other cards (A100 0.63 at 616 rows, B200 0.46 at
1024) and 0.68 at 8192 on H100. Needs one grouped product for all experts (Transformer Engine or `grouped_mm`)."""
ATTENTION = 0.50
"""Share of PEAK of flash attention, forward and backward together. Needs one call for all documents of a window."""
TILE = 128
"""Positions of a document are attended to in multiples of this."""
HBM, NVLINK, NETWORK = 2.8e12, 300e9, 45e9
"""Bytes a second that a GPU reaches: its memory, all-to-all in a node (340e9 seen), one 400 Gb/s adapter."""
NODE = 8
FUSED_PASSES = 12
"""Times that the rows of all experts are read or written by sorting them there and back, forward and backward. Needs
the fused permute of Transformer Engine; without it about 30."""
ACCUMULATED = 8.0
"""Bytes moved for each weight and micro-batch to add to its fp32 gradient; 12 without gradient-accumulation fusion."""
PROCESS = 5.0e9
"""CUDA's context, kernels and NCCL's buffers."""
FRAGMENTED = 1.05
"""Reserved over allocated memory (published runs: 1.03 to 1.08)."""


@dataclass(frozen=True)
class Shapes:
    """What one rank of a run works on."""

    run: RunConfig
    imbalance: float
    """Rows that the fullest expert rank gets, over the mean."""

    @property
    def tokens(self) -> float:
        """Positions of a micro-batch on this rank's context shard, before the tensor ranks share them."""
        return self.run.training.micro_batch_size * self.run.training.sequence_length / self.run.layout.context_parallel

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on each data-parallel rank."""
        return self.run.training.global_batch_size // (
            self.run.training.micro_batch_size * self.run.layout.data_parallel
        )

    @property
    def copies(self) -> tuple[float, float]:
        """Ranks that share the optimizer state of dense weights, and of experts."""
        layout = self.run.layout
        dense = layout.data_parallel * layout.context_parallel
        return dense, dense * layout.tensor_parallel / (layout.expert_parallel * layout.expert_tensor_parallel)

    def moe(self, layer: int) -> bool:
        """Whether a layer has experts."""
        moe = self.run.model.moe
        return moe is not None and layer >= moe.leading_dense_layers

    def weights(self, stage: int) -> tuple[float, float]:
        """Dense weights and experts of a pipeline stage on one rank."""
        model, layout = self.run.model, self.run.layout
        parts = [layer_parameters(model, layer, layout) for layer in stage_layers(model, layout, stage)]
        experts = sum(part["experts"] for part in parts)
        dense = sum(count for part in parts for name, count in part.items() if name not in BUFFERS) - experts
        table = model.vocab_size * model.hidden_size / layout.tensor_parallel
        return dense + table * ((stage == 0) + (stage == layout.pipeline_parallel - 1)), experts


# --- memory ----------------------------------------------------------------------------------------------------------


def kept_bytes(shapes: Shapes, layer: int) -> float:
    """Bytes that one layer keeps of one micro-batch until its backward pass, in bf16 and with flash attention."""
    model, training, tensor = shapes.run.model, shapes.run.training, shapes.run.layout.tensor_parallel
    hidden = model.hidden_size
    if training.recompute == "full":
        return shapes.tokens * 2 * hidden / tensor
    again = training.recompute_modules
    heads, keys, width = model.num_attention_heads, model.num_key_value_heads, model.head_dim
    norms = 2 * (2 if "layernorm" in again else 4) * hidden
    attention = 2 * (heads + 2 * keys) * width + 2 * heads * width + 4 * heads
    attention += 2 * (heads + keys) * width if model.qk_norm else 0
    moe = model.moe
    if moe is None or not shapes.moe(layer):
        return shapes.tokens / tensor * (norms + attention + (0 if "mlp" in again else 6 * model.ffn_hidden_size))
    if "moe" in again:
        return shapes.tokens / tensor * (norms + attention)
    rows = moe.top_k * shapes.imbalance
    inside = (4 if "moe_act" in again else 6) * moe.expert_ffn_hidden_size / shapes.run.layout.expert_tensor_parallel
    shared = 0 if "shared_experts" in again else 6 * moe.shared_expert_ffn_hidden_size
    routed = 8 * moe.num_experts + rows * (2 * hidden + inside + 8)
    return shapes.tokens / tensor * (norms + attention + routed + shared)


def working_bytes(shapes: Shapes) -> float:
    """What the layer at work needs beside what it keeps: gradients of its widest tensors, both sides of an exchange."""
    model, layout, moe = shapes.run.model, shapes.run.layout, shapes.run.model.moe
    tokens = shapes.tokens / layout.tensor_parallel
    wide = tokens * (4 * model.hidden_size + 8 * model.ffn_hidden_size)
    weights = 2 * 3 * model.hidden_size * model.ffn_hidden_size / layout.tensor_parallel
    if moe is not None:
        rows = tokens * moe.top_k * shapes.imbalance
        wide = rows * (4 * 2 * model.hidden_size + 8 * moe.expert_ffn_hidden_size)
        experts = moe.num_experts / layout.expert_parallel / layout.expert_tensor_parallel
        weights = 2 * 3 * model.hidden_size * moe.expert_ffn_hidden_size * experts
    if shapes.run.training.recompute == "full":
        whole = Shapes(_unrecomputed(shapes.run), shapes.imbalance)
        wide += kept_bytes(whole, model.num_layers - 1)
    return wide + weights


def in_flight(shapes: Shapes, stage: int) -> float:
    """Micro-batches whose activations a stage keeps at once."""
    stages, chunks = shapes.run.layout.pipeline_parallel, shapes.run.layout.pipeline_chunks_per_rank
    if chunks == 1:
        return min(shapes.micro_batches, stages - stage)
    return min(shapes.micro_batches, (2 * (stages - stage - 1) + (chunks - 1) * stages + 1) / chunks)


def memory(shapes: Shapes) -> dict[str, float]:
    """Bytes of the fullest pipeline stage, by part."""
    return max((_stage_memory(shapes, stage) for stage in range(shapes.run.layout.pipeline_parallel)), key=_total)


def _stage_memory(shapes: Shapes, stage: int) -> dict[str, float]:
    run = shapes.run
    (dense, experts), (dense_copies, expert_copies) = shapes.weights(stage), shapes.copies
    kept = sum(kept_bytes(shapes, layer) for layer in stage_layers(run.model, run.layout, stage))
    parts = {
        "weights": 2 * (dense + experts),
        "gradients": 4 * (dense + experts),
        "optimizer": 12 * (dense / dense_copies + experts / expert_copies),
        "activations": kept * in_flight(shapes, stage),
        "layer at work": working_bytes(shapes),
    }
    if stage == run.layout.pipeline_parallel - 1:
        # a chunk as bf16 and fp32, its softmax, its gradient; and the gradient of the output layer in bf16, twice
        table = run.model.vocab_size * run.model.hidden_size / run.layout.tensor_parallel
        rows = shapes.tokens / 2 * run.model.vocab_size / run.layout.tensor_parallel * 4
        parts["logits"] = 3 * min((run.training.logits_chunk_mb or 2048) * 2**20, rows) + 2 * 2 * table
    parts["fragments"] = (FRAGMENTED - 1) * _total(parts)
    return parts | {"process": PROCESS}


def _total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def _unrecomputed(run: RunConfig) -> RunConfig:
    return replace(run, training=replace(run.training, recompute="none", recompute_modules=[]))


# --- time ------------------------------------------------------------------------------------------------------------


def grouped_share(rows: float) -> float:
    """GROUPED between its entries, by the logarithm of the rows."""
    sizes = sorted(GROUPED)
    rows = min(max(rows, sizes[0]), sizes[-1])
    above = next(size for size in sizes if size >= rows)
    below = max(size for size in sizes if size <= rows)
    part = 0.0 if above == below else math.log(rows / below) / math.log(above / below)
    return GROUPED[below] + part * (GROUPED[above] - GROUPED[below])


def layer_time(shapes: Shapes, layer: int, documents: int) -> dict[str, float]:
    """Seconds of one micro-batch through one layer, forward and backward, by part; recomputation is a part."""
    model, layout = shapes.run.model, shapes.run.layout
    tokens, hidden = shapes.tokens / layout.tensor_parallel, model.hidden_size
    queries, keys = (heads * model.head_dim for heads in (model.num_attention_heads, model.num_key_value_heads))
    length = math.ceil(shapes.run.training.sequence_length / documents / TILE) * TILE
    parts = {
        "projections": 6 * 2 * hidden * (queries + keys) * tokens / (PEAK * GEMM),
        "attention": 12 * length * queries * tokens / (PEAK * ATTENTION),
        # norms and residuals forward and backward, rotation and head norms, activations
        "elementwise": 2 * tokens * (24 * hidden + 10 * (queries + keys)) / HBM,
    }
    moe, width = model.moe, model.ffn_hidden_size
    if moe is not None and shapes.moe(layer):
        width = moe.shared_expert_ffn_hidden_size
        rows = tokens * moe.top_k * shapes.imbalance
        share = grouped_share(tokens * moe.top_k * layout.expert_parallel / moe.num_experts)
        per_row = 3 * hidden * moe.expert_ffn_hidden_size
        parts["experts"] = 6 * rows * per_row / layout.expert_tensor_parallel / (PEAK * share)
        parts["router"] = 6 * tokens * hidden * moe.num_experts / (PEAK * 0.1)  # fp32 on tf32 units, few columns
        parts["exchange"] = 4 * 2 * hidden * rows * _exchange_seconds_per_byte(layout.expert_parallel)
        parts["permutation"] = FUSED_PASSES * 2 * hidden * rows / HBM
        parts["elementwise"] += 2 * 8 * rows * moe.expert_ffn_hidden_size / HBM
    parts["feed-forward"] = 6 * 3 * hidden * width * tokens / (PEAK * GEMM)
    parts["elementwise"] += 2 * 8 * tokens * width / HBM
    collectives = 10 if not shapes.moe(layer) else 5 + 5 * bool(width)
    others = (layout.tensor_parallel - 1) / layout.tensor_parallel
    parts["tensor parallel"] = collectives * 2 * hidden * shapes.tokens * others / NVLINK
    parts["recomputed"] = _recomputed(parts, shapes.run.training, shapes.moe(layer))
    return parts


def _recomputed(parts: dict[str, float], training: TrainingConfig, moe: bool) -> float:
    """Time of what is run again: a forward pass is a third of the products, and half of what is moved."""
    moved = {"exchange", "permutation", "elementwise", "tensor parallel"}
    if training.recompute == "full":
        again = set(parts)
    else:
        of_experts = {"moe": {"experts", "router", "feed-forward", "exchange", "permutation"}}
        of_layers = {"core_attn": {"attention"}, "shared_experts" if moe else "mlp": {"feed-forward"}}
        parts_of = of_layers | (of_experts if moe else {})
        again = set().union(*(parts_of.get(name, set()) for name in training.recompute_modules))
    seconds = sum(parts.get(name, 0.0) / (2 if name in moved else 3) for name in again)
    return seconds + 0.15 * parts["elementwise"] * bool({"moe_act", "layernorm"} & set(training.recompute_modules))


def _exchange_seconds_per_byte(ranks: int) -> float:
    """Of an all-to-all over so many consecutive ranks: the part for other nodes goes over the network."""
    inside = min(ranks, NODE)
    return (inside - 1) / ranks / NVLINK + (ranks - inside) / ranks / NETWORK


def head_time(shapes: Shapes) -> float:
    """Output layer and loss of one micro-batch on half of the positions; chunks run again in the backward pass."""
    model, tensor = shapes.run.model, shapes.run.layout.tensor_parallel
    logits = shapes.tokens / 2 * model.vocab_size / tensor
    return 8 * logits * model.hidden_size / (PEAK * GEMM) + 24 * logits / HBM


def step_time(shapes: Shapes, documents: int) -> dict[str, float]:
    """Seconds of a step, by part: those of the slowest stage, what it waits for others, and what is not hidden."""
    run, stages = shapes.run, shapes.run.layout.pipeline_parallel
    busy = [_stage_time(shapes, stage, documents) for stage in range(stages)]
    slowest = max(busy, key=_total)
    parts = {name: shapes.micro_batches * seconds for name, seconds in slowest.items()}
    parts["bubble"] = (stages - 1) / run.layout.pipeline_chunks_per_rank * _total(slowest)
    reduce, gather, update = _data_parallel_time(shapes)
    hidden = _total(slowest) if run.layout.overlap_grad_reduce else 0.0
    parts["data parallel"] = max(0.0, reduce - hidden * 2 / 3)
    parts["data parallel"] += max(0.0, gather - (hidden / 3 if run.layout.overlap_param_gather else 0.0))
    return parts | {"update": update}


def _stage_time(shapes: Shapes, stage: int, documents: int) -> dict[str, float]:
    parts: dict[str, float] = {}
    for layer in stage_layers(shapes.run.model, shapes.run.layout, stage):
        for name, seconds in layer_time(shapes, layer, documents).items():
            parts[name] = parts.get(name, 0.0) + seconds
    parts["accumulation"] = ACCUMULATED * sum(shapes.weights(stage)) / HBM
    if stage == shapes.run.layout.pipeline_parallel - 1:
        parts["head"] = head_time(shapes)
    return parts


def _data_parallel_time(shapes: Shapes) -> tuple[float, float, float]:
    """Reduction of fp32 gradients, gather of bf16 weights, and Adam's update, in seconds, of the largest stage."""
    layout = shapes.run.layout
    weights = max((shapes.weights(stage) for stage in range(layout.pipeline_parallel)), key=sum)
    members = (NODE / layout.tensor_parallel, NODE / min(NODE, layout.expert_parallel * layout.expert_tensor_parallel))
    per_byte = sum(count / min(NVLINK, NETWORK * near) for count, near in zip(weights, members, strict=True))
    update = sum(32 * count / copies / HBM for count, copies in zip(weights, shapes.copies, strict=True))
    return 4 * per_byte, 2 * per_byte, update


# --- report ----------------------------------------------------------------------------------------------------------


def report(run: RunConfig, imbalance: float) -> str:
    """Memory, and for each number of documents a window the step's parts, tokens a second and utilisation."""
    shapes, layout = Shapes(run, imbalance), run.layout
    held = memory(shapes)
    gigabytes = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in held.items() if size >= 5e7)
    lines = [
        f"{run.output_dir.rpartition('/')[2]}: {layout.world_size} GPUs, {shapes.micro_batches} micro-batches of "
        f"{shapes.tokens:,.0f} tokens",
        f"  memory {_total(held) / 1e9:.0f} GB = {_total(held) / CARD:.0%} of a card: {gigabytes}",
    ]
    tokens = run.training.global_batch_size * run.training.sequence_length / layout.world_size
    for documents in DOCUMENTS:
        parts = step_time(shapes, documents)
        needed = flops_per_token(
            run.model, run.training.sequence_length, keys_per_query=run.training.sequence_length / documents
        ).total
        speed = tokens / _total(parts)
        shares = ", ".join(f"{name} {part / _total(parts):.0%}" for name, part in parts.items() if part > 0)
        lines.append(
            f"  {documents:>2} documents: {_total(parts):5.2f} s a step, {speed:7,.0f} tokens/s/GPU, "
            f"{speed * needed / PEAK:.0%} of {PEAK / 1e12:.0f} TFLOP/s; {shares}"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which run, with which changes."""
    parser.add_argument("run", nargs="?", help="a run (default: the four published models)")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--imbalance", type=float, default=1.3, help="rows of the fullest expert rank over the mean")


def run(args: argparse.Namespace) -> int:
    """Print the reports."""
    for name in [args.run] if args.run else RUNS:
        print(report(load_run(name, args.overrides), args.imbalance))
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description="Estimates for H100s.")
    add_arguments(parser)
    parser.set_defaults(json=False, traceback=False)
    args = parser.parse_args()
    sys.exit(guarded(lambda: run(args), args))
