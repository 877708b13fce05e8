"""Published training runs as workloads of the planner, or the reason why one cannot be such.

The file holds what other projects measured and published, with the source of each case; nothing in it is ours.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.errors import DataError
from llada_megatron.llada_moe.planning.workload import LatentAttention, Stack, Widths, Workload

FILE = Path(__file__).parent / "measured_runs.json"
NATURAL_IMBALANCE = 1.3
"""Rows of the fullest expert rank over the mean where routing was not forced to be even and no loads are published."""
COMPUTE = {"bf16": "bf16", "mxfp8": "mxfp8", "fp8-mx": "mxfp8", "nvfp4": "nvfp4"}


class NotModelled(Exception):
    """A case has something that the planner does not estimate; the message names it."""


@dataclass(frozen=True)
class PublishedRun:
    """A case of the file: who measured it, on what, and how much."""

    name: str
    group: str
    gpu: str
    workload: Workload
    peak_bytes: float | None
    every_rank: bool
    """The peak is the largest of all ranks; otherwise that of the last pipeline stage."""
    step_s: float | None
    memory_label: str
    """Why the memory of this case is not predicted; empty where it is."""
    time_label: str
    """The same for its time."""


def read_cases(path: Path | None = None) -> list[dict[str, Any]]:
    """The cases of a file in the form of ours. Raises DataError where it is not such a file."""
    path = FILE if path is None else path
    try:
        cases = json.loads(path.read_text("utf-8"))["cases"]
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name a JSON file of published runs") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no file of published runs (an object with a list `cases`): {error}") from error
    if not isinstance(cases, list):
        raise DataError(f"{path}: `cases` must be a list, not {type(cases).__name__}")
    return cases


def gpu_of(case: dict[str, Any]) -> str:
    """The name in configs/gpus of the GPU of a case."""
    words = case["gpu"].lower().replace("-", " ").replace("dgx", " ").split()
    return next(word for word in words if any(letter.isdigit() for letter in word)).strip("(),")


def published_run(case: dict[str, Any]) -> PublishedRun:
    """Raises: NotModelled: the planner has no such thing; names it."""
    _refuse(case)
    measured = case["measured"]
    peak = measured.get("peak_alloc_gib_max_over_ranks")
    every = peak is not None
    if peak is None:
        peak = measured.get("peak_alloc_gib_last_rank", measured.get("peak_alloc_gib"))
    if peak is None and measured.get("peak_alloc_gb") is not None:
        peak, every = measured["peak_alloc_gb"] * 1e9 / 2**30, True
    step = measured.get("step_ms")
    tokens = measured.get("tokens_per_s_gpu", measured.get("tokens_per_s_gpu_derived"))
    batch, gpus = case["batch"], case["layout"]["gpus"]
    if step is None and tokens:
        step = 1000 * batch["global"] * batch["seq"] / gpus / tokens
    return PublishedRun(
        name=case["id"],
        group=case["group"],
        gpu=gpu_of(case),
        workload=workload_of(case),
        peak_bytes=None if peak is None else peak * 2**30,
        every_rank=every,
        step_s=None if step is None else step / 1000,
        memory_label=_memory_label(case),
        time_label=_time_label(case),
    )


def _refuse(case: dict[str, Any]) -> None:
    layout, batch = case["layout"], case["batch"]
    if case.get("kind"):
        raise NotModelled("one MoE layer, not a training step")
    if layout.get("fsdp") and layout["fsdp"] is not False:
        raise NotModelled("FSDP: weights are gathered layer by layer")
    if "torchtitan" in case["framework"]:
        raise NotModelled("torchtitan, not Megatron")
    if not layout.get("gpus") or not batch.get("micro") or not batch.get("global"):
        raise NotModelled("world size or batch not published")
    if case.get("recompute", {}).get("granularity") == "unknown" and case["measured"].get("step_ms") is None:
        raise NotModelled("recomputation not published")


def _memory_label(case: dict[str, Any]) -> str:
    """What makes the memory of a case more than a guess would give."""
    if (case.get("attention") or {}).get("backend") == "unfused":
        return "unfused attention keeps its scores"
    if "post-optimizer" in case["measured"]["statistic"]:
        return "the value is read after the update and is no peak"
    if case.get("dispatcher") == "allgather":
        return "the all-gather dispatcher keeps every rank's tokens"
    if case["precision"]["compute"] not in ("bf16", "fp32"):
        return "FP8 copies of weights and activations"
    if case["model"].get("mla") and case["model"].get("mtp_layers"):
        return "multi-token prediction over latent attention"
    return ""


def _time_label(case: dict[str, Any]) -> str:
    """What makes the time of a case another thing than that of a training step as people run it."""
    notes = " ".join(case.get("notes") or [])
    if "deterministic mode" in notes or "tiny model" in notes:
        return "a functional test: tiny, or with deterministic kernels"
    if (case.get("attention") or {}).get("backend") == "unfused":
        return "unfused attention"
    if case.get("world_size_inferred"):
        return "world size not published"
    if case["model"].get("experts") and "unknown" in (case.get("dispatcher"), case.get("cuda_graph")):
        return "dispatcher, overlap or CUDA graphs of an MoE not published"
    return ""


def workload_of(case: dict[str, Any]) -> Workload:
    """Of a case that `_refuse` lets pass."""
    stack, layout = stack_of_case(case), layout_of(case)
    batch, recompute, loss = case["batch"], case.get("recompute") or {}, case.get("loss") or {}
    routing, overlap = case.get("routing") or {}, case.get("overlap") or {}
    graph = case.get("cuda_graph")
    modules = {name for name in recompute.get("modules") or [] if name != "core_attn"}
    granularity = recompute.get("granularity")
    fused_loss = bool(loss.get("cross_entropy_fusion")) and str(loss.get("impl", "")).startswith("te")
    natural = stack.experts > 0 and routing.get("forced_balanced") in (False, None)
    causal = (case.get("attention") or {}).get("causal", True)
    dispatcher = str(case.get("dispatcher") or "")
    return Workload(
        stack=stack,
        layout=layout,
        sequence=batch["seq"],
        micro_batch=batch["micro"],
        micro_batches=int(batch.get("num_microbatches") or batch["global"] // batch["micro"] // layout.data_parallel),
        widths=widths_of_case(case),
        recompute="full" if granularity == "full" else "selective" if modules else "none",
        modules=frozenset(modules),
        keys_per_query=batch["seq"] / 2 if causal else None,
        logit_bytes=2.0 if fused_loss else 6.0,
        imbalance=NATURAL_IMBALANCE if natural and routing.get("forced_balanced") is False else 1.0,
        padded_rows=bool(routing.get("pad_to_capacity")),
        fused_accumulation=bool(case.get("gradient_accumulation_fusion", case["framework"] == "Megatron-Bridge")),
        distributed_optimizer=case["precision"].get("distributed_optimizer") is not False,
        overlap_exchange=bool(overlap.get("ep_a2a")),
        overlap_tensor=bool(overlap.get("tp_comm")) or case["framework"] == "Megatron-Bridge",
        graphs=_graphs(graph),
        fused_dispatch=dispatcher.startswith("flex"),
    )


def _graphs(graph: Any) -> str:
    if isinstance(graph, dict):
        words = f"{graph.get('impl')} {graph.get('scope')}"
        if graph.get("impl") == "full_iteration":
            return "all"
        return "part" if "attn" in words or "moe" in words else "none"
    return "part" if isinstance(graph, list) else "none"


def stack_of_case(case: dict[str, Any]) -> Stack:
    """The sizes of a case's model; the vocabulary is padded as Megatron does."""
    model = case["model"]
    multiple = model.get("make_vocab_size_divisible_by", 128) * case["layout"]["tp"]
    mla = model.get("mla")
    latent = None
    if mla:
        latent = LatentAttention(
            query_rank=mla.get("q_lora_rank") or 0,
            key_value_rank=mla["kv_lora_rank"],
            head=mla["qk_head_dim"],
            position_head=mla["qk_pos_emb_head_dim"],
            value_head=mla["v_head_dim"],
        )
    return Stack(
        layers=model["layers"],
        hidden=model["hidden"],
        heads=model["heads"],
        key_heads=model["kv_heads"] or model["heads"],
        head_dim=model["head_dim"],
        ffn=model["ffn"] or 0,
        vocab=math.ceil(model["vocab"] / multiple) * multiple,
        experts=model.get("experts") or 0,
        top_k=model.get("top_k") or 0,
        expert_ffn=model.get("expert_ffn") or 0,
        shared_ffn=model.get("shared_expert_ffn") or 0,
        leading_dense=model.get("leading_dense") or 0,
        qk_norm=bool(model.get("qk_norm")) and latent is None,
        gated=bool(model.get("gated_mlp")),
        biases=bool(model.get("linear_bias")),
        layer_norm="layernorm" in str(model.get("norm")).lower(),
        learned_positions=0 if model.get("position") == "rope" else case["batch"]["seq"],
        tied=bool(model.get("tied")),
        dropout=bool(model.get("hidden_dropout")),
        latent=latent,
        extra_heads=model.get("mtp_layers") or 0,
    )


def layout_of(case: dict[str, Any]) -> LayoutConfig:
    """The layout of a case; layers that do not divide are spread with fewer on the first and last chunk."""
    spread = case["layout"]
    stages, chunks = spread["pp"], spread.get("vpp") or 1
    layers, extra = case["model"]["layers"], case["model"].get("mtp_layers") or 0
    uneven = layers % (stages * chunks) > 0 or (extra > 0 and stages > 1)
    return LayoutConfig(
        tensor_parallel=spread["tp"],
        sequence_parallel=bool(spread["sp"]),
        pipeline_parallel=stages,
        pipeline_chunks_per_rank=chunks,
        pipeline_layers=uneven_layers(layers, stages * chunks, extra) if uneven else None,
        context_parallel=spread["cp"],
        data_parallel=spread["dp"] or spread["gpus"] // (spread["tp"] * stages * spread["cp"]),
        expert_parallel=spread["ep"] or 1,
        expert_tensor_parallel=spread["etp"] or 1,
    )


def uneven_layers(layers: int, chunks: int, extra_heads: int) -> list[int]:
    """Layers of each chunk where they do not divide: the embedding and the output layer count as a layer each. With
    heads for further tokens, as DeepSeek-V3's presets have it: the last chunk gives up three, the first none."""
    if extra_heads:
        most = math.ceil((layers + 3) / chunks)
        if layers > most * (chunks - 1):
            return [most] * (chunks - 1) + [layers - most * (chunks - 1)]
    whole, rest = divmod(layers + 2, chunks)
    sizes = [whole + (chunk < rest) for chunk in range(chunks)]
    sizes[0] -= 1
    sizes[-1] -= 1
    return sizes


def widths_of_case(case: dict[str, Any]) -> Widths:
    """Bytes of a parameter's forms in a case."""
    precision = case["precision"]
    compute = str(precision["compute"])
    kind = COMPUTE.get(compute, "fp8" if compute.startswith("fp8") else compute)
    half = str(precision.get("main_grads") or "").startswith("bf16")
    gathered = 1.0 if precision.get("fp8_param_gather") else 2.0
    return Widths(gradient=2.0 if half else 4.0, gathered=gathered, compute=kind)
