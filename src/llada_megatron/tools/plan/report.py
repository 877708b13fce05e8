"""The report of `llada plan`: memory, messages, time and cost, as text and as plain values."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llada_megatron.console import count_text, rate_text, size_text
from llada_megatron.llada_moe.model.parameters import count_parameters, trained_parameters
from llada_megatron.llada_moe.planning.estimate import GIB, Estimate
from llada_megatron.llada_moe.planning.held_parameters import Held
from llada_megatron.llada_moe.planning.layout_search import (
    Found,
    every_recomputation,
    more_gpus,
    smallest_change,
    taken_back,
)
from llada_megatron.llada_moe.planning.memory import StageMemory

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.run import RunConfig

BAR = 40
LETTERS = {
    "weights": "W",
    "gradients": "G",
    "main weights": "M",
    "optimizer": "O",
    "activations": "A",
    "layer at work": "l",
    "recomputed layer": "r",
    "all-to-all": "x",
    "logits": "L",
    "gradient dummies": "d",
    "workspaces": "w",
}


def report(estimate: Estimate) -> str:
    """All of it as text."""
    parts = [head(estimate), memory_table(estimate), recompute_table(estimate), traffic_table(estimate)]
    return "\n\n".join([*parts, time_table(estimate), assumptions(estimate)])


def head(estimate: Estimate) -> str:
    """What runs where, and the verdict."""
    layout, gpu = estimate.run.layout, estimate.gpu
    axes = (
        f"tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x context {layout.context_parallel} x "
        f"data {layout.data_parallel}, expert {layout.expert_parallel}"
    )
    need, card = estimate.card_bytes / GIB, gpu.memory_gib
    verdict = f"fits: {need:.1f} of {card:.1f} GiB on the fullest rank"
    if not estimate.fits:
        change = smallest_change(estimate)
        verdict = f"DOES NOT FIT: {need:.1f} GiB on the fullest rank, {card:.1f} on a card"
        without = f"no change of recomputation or layout fits; {more_gpus(estimate)}"
        verdict += f"; it fits with {change}" if change else f"; {without}"
    return f"{layout.world_size} x {gpu.name}: {axes}\n{verdict}"


def memory_table(estimate: Estimate) -> str:
    """Each stage's rank by part, in GiB, and a bar for each."""
    stages = estimate.stages
    names = [name for name in stages[0].parts if any(stage.parts[name] >= 0.005 * GIB for stage in stages)]
    rows = [["GiB", *(f"stage {stage.stage}" for stage in stages)]]
    rows += [[name, *(f"{stage.parts[name] / GIB:.2f}" for stage in stages)] for name in names]
    rows.append(["allocated", *(f"{stage.allocated / GIB:.2f}" for stage in stages)])
    gpu = estimate.gpu
    messages = f" + {gpu.communicators_gib:g} (communicators)" if estimate.run.layout.world_size > 1 else ""
    outside = (
        f"on the card: {estimate.card_bytes / GIB:.1f} GiB = allocated x {gpu.reserved_over_allocated:g} (allocator) + "
        f"{gpu.context_gib:g} (context){messages}"
    )
    cache = (
        f"sampling with a cache: {size_text(estimate.cache_bytes)} of keys and values for each sequence of "
        f"{estimate.run.training.sequence_length:,} positions"
    )
    largest = max(stage.allocated for stage in stages)
    bars = [f"  stage {stage.stage:<3} {bar(stage, largest)}" for stage in stages]
    legend = ", ".join(f"{LETTERS[name]} {name}" for name in names)
    return "\n".join(["memory of a rank", *aligned(rows), f"  {outside}", f"  {cache}", *bars, f"  {legend}"])


def bar(stage: StageMemory, largest: float) -> str:
    """The parts of a stage as letters, one for each share of the largest stage."""
    text, done = "", 0.0
    for name, size in stage.parts.items():
        done += size
        text += LETTERS[name] * (round(BAR * done / largest) - len(text))
    return text


def recompute_table(estimate: Estimate) -> str:
    """Activations and step time of the run with each recomputation."""
    rows = [["recompute", "activations GiB", "on the card GiB", "step s"]]
    for recompute, modules in every_recomputation(estimate.run):
        other = with_recomputation(estimate, recompute, modules)
        kept = other.worst.parts["activations"] / GIB
        rows.append(
            [
                " ".join(modules or [recompute]),
                f"{kept:.2f}",
                f"{other.card_bytes / GIB:.1f}",
                f"{other.time.total:.3f}",
            ]
        )
    return "\n".join(["with each recomputation", *aligned(rows)])


def with_recomputation(estimate: Estimate, recompute: str, modules: tuple[str, ...]) -> Estimate:
    """The same run with another recomputation."""
    training = replace(estimate.run.training, recompute=recompute, recompute_modules=list(modules))
    return replace(estimate, run=replace(estimate.run, training=training))


def traffic_table(estimate: Estimate) -> str:
    """Bytes that a rank sends in a step, by axis and link."""
    rows = [["axis", "ranks", "sent in a step", "inside a node", "between nodes"]]
    for each in estimate.traffic:
        outside = each.sent * each.outside
        rows.append(
            [each.axis, str(each.ranks), size_text(each.sent), size_text(each.sent - outside), size_text(outside)]
        )
    return "\n".join(["messages of a rank", *aligned(rows)]) if len(rows) > 1 else "messages: none, one rank"


def time_table(estimate: Estimate) -> str:
    """The step by part, its speed, and what the run takes."""
    time, training = estimate.time, estimate.run.training
    widest = max(time.parts.values())
    lines = ["time of a step (estimated)"]
    for name, seconds in time.parts.items():
        drawn = "#" * round(BAR * seconds / widest)
        lines.append(f"  {name:<18}{seconds:9.3f} s {seconds / time.total:5.0%}  {drawn}")
    micro = ", ".join(f"{seconds * 1000:.1f}" for seconds in time.stages)
    tokens = estimate.tokens_per_step * training.steps
    lines += [
        f"  {'total':<18}{time.total:9.3f} s",
        f"  a micro-batch on each stage: {micro} ms",
        f"  {estimate.tokens_per_second:,.0f} tokens/s/GPU, "
        f"{rate_text(estimate.flops_per_step / time.total / estimate.run.layout.world_size)} each, "
        f"{estimate.utilisation:.1%} of the bf16 peak",
        f"  {training.steps:,} steps: {count_text(tokens)} tokens, {estimate.run_seconds / 86400:.1f} days, "
        f"{estimate.gpu_hours:,.0f} GPU-hours",
    ]
    return "\n".join(lines)


def assumptions(estimate: Estimate) -> str:
    """Everything that was assumed, with its value."""
    gpu, assumed = estimate.gpu, estimate.assumed
    counted = "counted in the model built on the meta device" if estimate.counted else "from the sizes"
    return "\n".join(
        [
            "assumed",
            f"  parameters: {counted}; kernels: Transformer Engine with flash attention, activations in bf16",
            f"  {loads_text(estimate)}; {assumed.documents:g} documents a window",
            *copies_lines(estimate),
            *layout_lines(estimate),
            *trained_lines(estimate),
            *fp8_lines(estimate),
            f"  products reach {gpu.gemm_share:.0%} of {gpu.bf16_tflops:g} TFLOP/s (less where a rank's matrix is "
            f"narrow; half of that at {gpu.grouped_half_rows:.0f} rows for each expert), attention "
            f"{gpu.attention_share:.0%}",
            f"  memory {gpu.memory_rate / 1e9:.0f} GB/s, link {gpu.link_rate / 1e9:.0f} GB/s, network "
            f"{gpu.network_rate / 1e9:.0f} GB/s for each GPU, {gpu.gpus_per_node} GPUs a node",
            f"  a layer and micro-batch takes at least {gpu.dense_host_us / 1000:.1f} ms dense, "
            f"{gpu.moe_host_us / 1000:.1f} ms MoE on the host",
            "  constants: fitted on published runs of others, against which `llada bench plan` holds the estimate",
        ]
    )


def copies_lines(estimate: Estimate) -> list[str]:
    """Which steps are planned, where they differ."""
    copies = round(1 / estimate.workload.supervised)
    if copies == 1:
        return []
    return [f"  the steps whose sequences hold their text {copies} times, {estimate.largest_share:.0%} of the run's"]


def trained_lines(estimate: Estimate) -> list[str]:
    """What is counted of a run that does not train every weight."""
    run = estimate.run
    trained, total = trained_parameters(run.model, run.training), count_parameters(run.model).trainable
    if trained == total:
        return []
    return [
        f"  {count_text(trained)} parameters are trained ({trained / total:.2%} of the model's), on each stage in "
        "proportion; activations and time are those of a run that trains every weight, more than it needs"
    ]


def fp8_lines(estimate: Estimate) -> list[str]:
    """What was measured otherwise than it is planned."""
    run = estimate.run
    if run.training.fp8 is None or run.model.moe is None:
        return []
    return [
        "  experts gain from FP8 as dense layers do: on an H200 they did not, and a step took 1.07 times as long as in "
        "bf16 with 8 experts on a rank, 1.54 times with 64 (docs/gpu.md)"
    ]


def layout_lines(estimate: Estimate) -> list[str]:
    """What of the layout is planned as something else, or is not counted."""
    layout, lines = estimate.run.layout, []
    if layout.expert_dispatcher == "allgather":
        lines.append("  layout.expert_dispatcher allgather is planned as alltoall, which keeps and sends less")
    if layout.tensor_parallel > estimate.run.model.num_key_value_heads:
        lines.append(
            f"  tensor {layout.tensor_parallel} is more than the {estimate.run.model.num_key_value_heads} key heads: "
            "the gather of queries, keys and values among the ranks that share a head is not counted"
        )
    return lines


def loads_text(estimate: Estimate) -> str:
    """How many rows the fullest expert rank gets, and where that is from."""
    assumed, workload = estimate.assumed, estimate.workload
    if assumed.loads is None:
        return f"the fullest expert rank gets {assumed.imbalance:g} x the mean rows"
    if estimate.run.layout.expert_parallel == 1:
        return f"one expert rank holds all experts, so that the loads of {assumed.loads.source} change nothing"
    by_layer = workload.layer_imbalance[workload.stack.leading_dense :]
    worst = max(range(len(by_layer)), key=lambda layer: by_layer[layer])
    even = replace(estimate, assumed=replace(assumed, imbalance=1.0, loads=None))
    return (
        f"the fullest of {estimate.run.layout.expert_parallel} expert ranks gets {sum(by_layer) / len(by_layer):.2f} x "
        f"the mean rows, {by_layer[worst]:.2f} x in layer {worst + workload.stack.leading_dense + 1} (measured, "
        f"{assumed.loads.source}); with even loads a step would take {even.time.total:.3f} s and the card "
        f"{even.card_bytes / GIB:.1f} GiB"
    )


def search_table(found: Found, top: int, run: RunConfig) -> str:
    """The best layouts of `run`, and why the others fall."""
    rows = [["step s", "tokens/s/GPU", "peak", "GiB", "layout", "micro-batch", "recompute"]]
    for each in found.ranked[:top]:
        training = each.run.training
        rows.append(
            [
                f"{each.time.total:.3f}",
                f"{each.tokens_per_second:,.0f}",
                f"{each.utilisation:.1%}",
                f"{each.card_bytes / GIB:.1f}",
                layout_text(each),
                str(training.micro_batch_size),
                " ".join([training.recompute, *training.recompute_modules]),
            ]
        )
    lines = [f"{found.examined} layouts, {len(found.ranked)} fit", *aligned(rows)]
    if taken_back(run):
        lines.append(f"all of them with {' '.join(taken_back(run))}")
    if found.ranked[top:]:
        lines.append(f"{len(found.ranked) - top} more fit and are slower: {slower(found, top)}")
    if found.too_large:
        nearest = found.too_large[0]
        lines.append(
            f"{len(found.too_large)} do not fit; the smallest of them needs {nearest.card_bytes / GIB:.1f} GiB "
            f"({layout_text(nearest)})"
        )
    if found.refused:
        reasons = ", ".join(f"{key} {count}" for key, count in found.refused.most_common())
        lines.append(f"cannot be laid out, by the key that forbids it: {reasons}")
    return "\n".join(lines)


def slower(found: Found, top: int) -> str:
    """By which part of the step the layouts below the table lose most against the best one."""
    best = found.ranked[0].time.parts
    losses: dict[str, int] = {}
    for each in found.ranked[top:]:
        more = {name: seconds - best.get(name, 0.0) for name, seconds in each.time.parts.items()}
        name = max(more, key=lambda part: more[part])
        losses[name] = losses.get(name, 0) + 1
    return ", ".join(f"{count} by {name}" for name, count in sorted(losses.items(), key=lambda pair: -pair[1]))


def layout_text(estimate: Estimate) -> str:
    """A layout in the field's short form."""
    layout = estimate.run.layout
    chunks = f"x{layout.pipeline_chunks_per_rank}" if layout.pipeline_chunks_per_rank > 1 else ""
    return (
        f"TP{layout.tensor_parallel} PP{layout.pipeline_parallel}{chunks} CP{layout.context_parallel} "
        f"DP{layout.data_parallel} EP{layout.expert_parallel}"
    )


def aligned(rows: list[list[str]]) -> list[str]:
    """Rows as columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return ["  " + "  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, padded, strict=True)]


def values(estimate: Estimate) -> dict[str, Any]:
    """The report as plain values: bytes, seconds and counts."""
    layout = estimate.run.layout
    return {
        "gpus": layout.world_size,
        "gpu": estimate.gpu.name,
        "layout": {key: value for key, value in vars(layout).items() if value is not None},
        "micro_batch_size": estimate.run.training.micro_batch_size,
        "recompute": estimate.run.training.recompute,
        "recompute_modules": estimate.run.training.recompute_modules,
        "fits": estimate.fits,
        "card_bytes": estimate.card_bytes,
        "worst_stage": estimate.worst.stage,
        "cache_bytes_per_sequence": estimate.cache_bytes,
        "stages": [
            {
                "stage": stage.stage,
                "parameters": _parameters(held),
                "allocated_bytes": stage.allocated,
                "bytes": stage.parts,
            }
            for stage, held in zip(estimate.stages, estimate.held, strict=True)
        ],
        "messages": [
            {"axis": each.axis, "ranks": each.ranks, "sent_bytes": each.sent, "between_nodes": each.sent * each.outside}
            for each in estimate.traffic
        ],
        "step_s": estimate.time.total,
        "step_parts_s": estimate.time.parts,
        "stage_micro_batch_s": estimate.time.stages,
        "tokens_per_s_gpu": estimate.tokens_per_second,
        "flops_per_step": estimate.flops_per_step,
        "utilisation": estimate.utilisation,
        "total_tokens": estimate.tokens_per_step * estimate.run.training.steps,
        "run_s": estimate.run_seconds,
        "gpu_hours": estimate.gpu_hours,
        "assumed": _assumed(estimate),
    }


def _assumed(estimate: Estimate) -> dict[str, Any]:
    assumed = estimate.assumed
    found: dict[str, Any] = {"documents": assumed.documents} | vars(estimate.gpu)
    if assumed.loads is None:
        return found | {"imbalance": assumed.imbalance}
    return found | {"profile": assumed.loads.source, "layer_imbalance": list(estimate.workload.layer_imbalance)}


def _parameters(held: Held) -> dict[str, int]:
    return {"dense": held.dense, "experts": held.experts}
