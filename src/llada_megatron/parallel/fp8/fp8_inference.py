"""FP8 outside training: the layers' weights are kept in FP8 alone, one byte a parameter, and their products run in it.

Experts and linear layers add empty rows until their products can be tiled: a pass has as many tokens as there are to
run.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core import fp8_utils
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.llada_moe.config.fp8 import INFERENCE_RECIPES, FP8Config, check_widths
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.parsing import closest
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.training import TrainingConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.parallel.fp8.recipes import require_device


def require(recipe: str, run: RunConfig, layout: LayoutConfig) -> None:
    """Refuse FP8 where this model or this machine cannot run it.

    Raises:
        ConfigError: another recipe, a model in fp32 or with low-rank factors, or a width that a rank's products cannot
            have.
        ResourceError: no GPU here, one without that recipe, or no Transformer Engine.
    """
    if recipe not in INFERENCE_RECIPES:
        usable = ", ".join(INFERENCE_RECIPES)
        raise ConfigError(f"fp8 {recipe}: one of {usable}{closest(recipe, list(INFERENCE_RECIPES))}")
    if run.training.precision != "bf16":
        raise ConfigError(
            f"fp8 {recipe}: this model is in {run.training.precision}, and FP8 products add up to bf16; compute without"
        )
    if run.training.lora is not None:
        raise ConfigError(
            f"fp8 {recipe}: low-rank factors (training.lora) stand beside the weights of this checkpoint; merge them "
            "first (`llada convert export`, then `llada convert import`), or compute without FP8"
        )

    def refuse(key: str, reason: str) -> None:
        raise ConfigError(f"fp8 {recipe}: {key}: {reason}")

    check_widths(recipe, run.model, layout, refuse)
    require_device(_keys(recipe, run.training), "fp8", "compute without FP8")


def training_keys(recipe: str, training: TrainingConfig) -> TrainingConfig:
    """`training` such that `build.transformer_config` describes a model in FP8; layers that were trained in bf16 stay
    in it."""
    return replace(training, fp8=_keys(recipe, training))


def adapt(config: TransformerConfig) -> None:
    """For passes of any number of tokens: an expert adds empty rows to its own tokens. In training the router gives it
    tokens of others instead, of which a short pass has too few."""
    config.moe_router_padding_for_quantization = False


def pad_products(chunks: list[torch.nn.Module]) -> None:
    """Let every linear layer add empty rows to its input where FP8 cannot tile it, and drop them from its output."""
    for chunk in chunks:
        fp8_utils.prepare_model_for_fp8_inference(chunk)


def _keys(recipe: str, training: TrainingConfig) -> FP8Config:
    trained = training.fp8
    return FP8Config(
        recipe=recipe,  # type: ignore[arg-type]  # `require` has looked at it
        num_layers_at_start_in_bf16=trained.num_layers_at_start_in_bf16 if trained else 0,
        num_layers_at_end_in_bf16=trained.num_layers_at_end_in_bf16 if trained else 0,
        param_gather=True,
    )
