"""Matrix products in FP8: the keys of `training.fp8`, and what no GPU could run.

Widths and token counts are refused by what Transformer Engine 2.20 asks of the operands of its products
(`assert_dim_for_fp8_exec` and `is_quantizable` of its quantizers, `get_align_size_for_quantization`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.parsing import Refuse

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.training import TrainingConfig

WIDTH_MULTIPLE = {"delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""Features of a weight's sides on one rank, by recipe: a whole number of the blocks that share a scale, or of the
16 bytes that an FP8 product reads at a time."""

TOKEN_MULTIPLE = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}
"""Tokens of a micro-batch on one rank, by recipe: they are the inner side of the weight gradient's product."""

AMAX_HISTORY_LENGTH = 1024

INFERENCE_RECIPES = ("blockwise", "tensorwise")
"""Recipes that a model can be sampled with: their scales come from the tensor at hand, and they keep weights in FP8."""

_KEEPS_NO_WEIGHTS = {
    "delayed": "a weight that was never used has no maxima and would be rounded with a scale of 1",
    "mxfp8": "Megatron would gather the weights through the buffer of the gradients, which is not supported",
}


@dataclass(frozen=True, kw_only=True)
class FP8Config:
    """Matrix products of the layers in FP8 through Transformer Engine; the output layer, the router, attention and
    norms stay in bf16. Leave the section out to train in bf16."""

    recipe: Literal["blockwise", "tensorwise", "delayed", "mxfp8"]
    """Where a scale comes from. blockwise: each block of 128 (activations) or 128 x 128 (weights), E4M3 both ways
    (Hopper). tensorwise: each tensor's present maximum; delayed: its maxima of earlier steps; both E4M3 forwards and
    E5M2 for gradients (compute capability 8.9 and up). mxfp8: each 32 values, E4M3 both ways (Blackwell)."""
    num_layers_at_start_in_bf16: int = 0
    """The first layers stay in bf16; not with recipe delayed."""
    num_layers_at_end_in_bf16: int = 0
    """The last layers stay in bf16; not with recipe delayed."""
    amax_history_length: int = AMAX_HISTORY_LENGTH
    """Steps (micro-batches) over which recipe delayed takes the maximum."""
    param_gather: bool = False
    """Keep the weights of the layers in FP8, and gather them so over data-parallel ranks: one byte a weight, of two in
    bf16, but for a transposed copy that Transformer Engine may keep. Main weights stay in fp32. With recipe
    blockwise or tensorwise."""


def check_fp8(training: TrainingConfig, model: ModelConfig, layout: LayoutConfig, refuse: Refuse) -> None:
    """Everything about FP8 that does not depend on the device; the model and the layout can be laid out."""
    fp8 = training.fp8
    if fp8 is None:
        return
    if training.precision != "bf16":
        refuse("training.fp8", f"needs training.precision bf16 (it is {training.precision}): FP8 products add up to it")
    if model.moe is not None and layout.expert_dispatcher == "allgather":
        refuse(
            "layout.expert_dispatcher",
            "allgather cannot pad the tokens of each expert, which training.fp8 needs; use alltoall, or remove "
            "training.fp8",
        )
    again = [part for part in training.recompute_modules if part in ("moe_act", "layernorm")]
    if fp8.recipe == "delayed" and again:
        refuse(
            "training.recompute_modules",
            f"{again[0]} with FP8 recipe delayed: its maxima would count a second pass; leave it out, or use recipe "
            "tensorwise",
        )
    _check_history(fp8, refuse)
    _check_bf16_layers(fp8, model.num_layers, layout, refuse)
    check_widths(fp8.recipe, model, layout, refuse)
    _check_tokens(fp8.recipe, training, layout, refuse)


def check_param_gather(fp8: FP8Config | None, low_precision: list[str], load: str | None, refuse: Refuse) -> None:
    """Weights in FP8, against keys of the optimizer that are not fp32 and the weights to start from."""
    if fp8 is None or not fp8.param_gather:
        return
    if fp8.recipe in _KEEPS_NO_WEIGHTS:
        refuse(
            "training.fp8.param_gather", f"true with recipe {fp8.recipe}: {_KEEPS_NO_WEIGHTS[fp8.recipe]}; use false"
        )
    for key, _, value in (entry.partition(": ") for entry in low_precision):
        refuse(
            f"optimizer.{key}",
            f"{value} with training.fp8.param_gather: FusedAdam would hold the main weights, made from rounded ones; "
            "use fp32",
        )
    if load is not None:
        refuse(
            "checkpoint.load",
            "with training.fp8.param_gather the main weights would begin rounded to FP8; use training.fp8.param_gather "
            "false",
        )


def _check_history(fp8: FP8Config, refuse: Refuse) -> None:
    if fp8.amax_history_length < 1:
        refuse("training.fp8.amax_history_length", f"{fp8.amax_history_length} must be at least 1")
    elif fp8.recipe != "delayed" and fp8.amax_history_length != AMAX_HISTORY_LENGTH:
        refuse("training.fp8.amax_history_length", f"recipe {fp8.recipe} has no history; remove the key")


def _check_bf16_layers(fp8: FP8Config, layers: int, layout: LayoutConfig, refuse: Refuse) -> None:
    most = layers // layout.pipeline_parallel
    for key in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        count = getattr(fp8, key)
        if count and fp8.recipe == "delayed":
            refuse(
                f"training.fp8.{key}",
                f"{count} with recipe delayed: its scales are updated for all layers together; use 0, or recipe "
                "tensorwise",
            )
        elif not 0 <= count <= most:
            refuse(
                f"training.fp8.{key}",
                f"{count} must lie between 0 and {most}, the layers of one of {layout.pipeline_parallel} pipeline "
                "stages",
            )
    if fp8.num_layers_at_start_in_bf16 + fp8.num_layers_at_end_in_bf16 >= layers:
        refuse("training.fp8", f"no layer is left in FP8 of {layers}: lower the num_layers_… keys, or remove it")


def check_widths(recipe: str, model: ModelConfig, layout: LayoutConfig, refuse: Refuse) -> None:
    """Both sides of every weight of a layer, as a rank holds it."""
    multiple = WIDTH_MULTIPLE[recipe]
    for key, value, factors, axis in _sides(model):
        parts = getattr(layout, axis) if axis else 1
        wrong = next((factor for factor in factors if factor * value % (multiple * parts)), None)
        if wrong is None:
            continue
        usable = _nearest(value, math.lcm(*(_step(factor, parts, multiple) for factor in factors)))
        shown = f"{wrong} x {value}" if wrong > 1 else f"{value}"
        shown += f" / {axis} {parts} = {wrong * value // parts} a rank" if parts > 1 else ""
        refuse(
            f"model.{key}",
            f"{shown} is not a multiple of {multiple}, which FP8 with recipe {recipe} needs; the nearest {key} that "
            f"can be: {usable}" + (f"; or lower {axis}" if parts > 1 else ""),
        )


def _sides(model: ModelConfig) -> Iterator[tuple[str, int, tuple[int, ...], str]]:
    """Key and value of a width, how often weights have it, and the axis of the layout that cuts them ("" = none)."""
    heads, key_heads = model.num_attention_heads, model.num_key_value_heads
    yield "hidden_size", model.hidden_size, (1,), ""
    yield "head_dim", model.head_dim, (heads, heads + 2 * key_heads), "tensor_parallel"
    if model.moe is None or model.moe.leading_dense_layers:
        yield "ffn_hidden_size", model.ffn_hidden_size, (1,), "tensor_parallel"
    if model.moe is not None:
        yield "moe.expert_ffn_hidden_size", model.moe.expert_ffn_hidden_size, (1,), "expert_tensor_parallel"
        if shared := model.moe.shared_expert_ffn_hidden_size:
            yield "moe.shared_expert_ffn_hidden_size", shared, (1,), "tensor_parallel"


def _nearest(value: int, step: int) -> str:
    """The multiples of `step` below and above a value that is none, as text."""
    below = value // step * step
    return " or ".join(str(number) for number in (below, below + step) if number)


def _step(factor: int, parts: int, multiple: int) -> int:
    """The smallest v > 0 such that factor * v / parts is a multiple of `multiple`; all others are its multiples."""
    return multiple * parts // math.gcd(multiple * parts, factor)


def _check_tokens(recipe: str, training: TrainingConfig, layout: LayoutConfig, refuse: Refuse) -> None:
    parts = layout.context_parallel * (layout.tensor_parallel if layout.sequence_parallel else 1)
    step = _step(training.micro_batch_size, parts, TOKEN_MULTIPLE[recipe])
    if training.sequence_length % step:
        axes = f"context_parallel {layout.context_parallel}"
        if layout.sequence_parallel:
            axes += f" / tensor_parallel {layout.tensor_parallel}"
        tokens = training.micro_batch_size * training.sequence_length / parts
        refuse(
            "training.sequence_length",
            f"micro_batch_size {training.micro_batch_size} x {training.sequence_length} / {axes} = {tokens:g} tokens a "
            f"rank, not a multiple of {TOKEN_MULTIPLE[recipe]}, which FP8 with recipe {recipe} needs; use "
            f"{_nearest(training.sequence_length, step)}",
        )
