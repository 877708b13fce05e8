"""What each FP8 recipe needs of a machine, and what Megatron is told of it.

Megatron enters Transformer Engine's autocast around the layers that run in FP8 (`fp8_utils.get_fp8_context`): their
linear layers quantise inputs, weights and gradients; everything between them, the output layer and the optimizer's main
weights stay as in bf16.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from llada_megatron.llada_moe.config.fp8 import FP8Config
from llada_megatron.llada_moe.errors import ConfigError, ResourceError
from llada_megatron.parallel.machine import driver_fault

if TYPE_CHECKING:
    from llada_megatron.llada_moe.planning.gpu_sheet import GpuSheet

FORMATS = {"delayed": "hybrid", "tensorwise": "hybrid", "blockwise": "e4m3", "mxfp8": "e4m3"}
"""hybrid: E4M3 for activations and weights, E5M2 for gradients. A scale for every block leaves gradients no range that
E4M3 lacks."""

_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
"""Lowest compute capability (Transformer Engine 2.20, `pytorch/quantization.py`)."""

_NO_MXFP8 = (12, 0)
"""From this compute capability on Transformer Engine has no MXFP8 for all three products of a layer."""

_CUDA = {"blockwise": (12, 9)}
"""Lowest CUDA version torch must be built for, where it is above what any GPU with FP8 needs."""

_INSTEAD = "remove training.fp8 to train in bf16"


def transformer_fields(fp8: FP8Config | None, experts: bool) -> dict[str, Any]:
    """Fields of Megatron's TransformerConfig; none without FP8. `experts`: some layers have routed experts."""
    if fp8 is None:
        return {}
    return {
        "fp8": FORMATS[fp8.recipe],
        "fp8_recipe": fp8.recipe,
        "fp8_amax_history_len": fp8.amax_history_length,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": bool(fp8.num_layers_at_start_in_bf16 or fp8.num_layers_at_end_in_bf16),
        "num_layers_at_start_in_bf16": fp8.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": fp8.num_layers_at_end_in_bf16,
        "fp8_param": fp8.param_gather,
        # each expert gets a whole multiple of the tokens that its products read at a time: some go to it with weight 0
        "moe_router_padding_for_quantization": experts,
    }


def reduction_fields(fp8: FP8Config | None) -> dict[str, Any]:
    """Fields of Megatron's DistributedDataParallelConfig; none without weights in FP8."""
    return {"fp8_param_gather": True} if fp8 is not None and fp8.param_gather else {}


def optimizer_fields(fp8: FP8Config | None) -> dict[str, Any]:
    """Fields of Megatron's OptimizerConfig; none without weights in FP8, for which alone it asks the recipe."""
    return {"fp8_recipe": fp8.recipe} if fp8 is not None and fp8.param_gather else {}


def adapt_delayed_scaling() -> None:
    """Let Megatron make the recipe of delayed scaling with a Transformer Engine that has no `override_linear_precision`
    any more (2.20), which megatron-core 0.16.1 and 0.19.2 still pass (extensions/transformer_engine.py). Idempotent.

    It said that weight gradients should be computed in bf16, which no run asks for.
    """
    from megatron.core import fp8_utils

    recipe = getattr(fp8_utils, "TEDelayedScaling", None)
    if recipe is None or "override_linear_precision" in inspect.signature(recipe.__bases__[0]).parameters:
        return

    def make(self: Any, config: Any, fp8_format: Any, override_linear_precision: Any = None) -> None:
        recipe.__bases__[0].__init__(
            self,
            margin=config.fp8_margin,
            fp8_format=fp8_format,
            amax_history_len=config.fp8_amax_history_len,
            amax_compute_algo=config.fp8_amax_compute_algo,
            fp8_dpa=config.fp8_dot_product_attention,
            fp8_mha=config.fp8_multi_head_attention,
        )

    recipe.__init__ = make


def require_device(fp8: FP8Config | None, key: str = "training.fp8", instead: str = _INSTEAD) -> None:
    """Refuse FP8 where this process could not run it; nothing without FP8.

    Args:
        key: what asked for it.
        instead: how to do without.

    Raises:
        ResourceError: there is no GPU, or one that its driver keeps torch from, it has no such FP8, or Transformer
            Engine cannot be used here.
    """
    if fp8 is None:
        return
    import torch

    from llada_megatron.llada_moe.model.accelerations import transformer_engine

    if not torch.cuda.is_available():
        fault = driver_fault()
        if fault:
            raise ResourceError(fault)
        raise ResourceError(f"{key} (recipe {fp8.recipe}) needs a GPU with FP8, and none can be seen here; {instead}")
    for index in range(torch.cuda.device_count()):
        reason = obstacle(fp8.recipe, torch.cuda.get_device_capability(index), torch.version.cuda or "0", instead)
        if reason is not None:
            raise ResourceError(f"{key}: GPU {index} ({torch.cuda.get_device_name(index)}): {reason}")
    engine = transformer_engine()
    if not engine.active:
        raise ResourceError(f"{key} needs Transformer Engine: {engine.detail}; or {instead}")


def require_sheet(fp8: FP8Config | None, gpu: GpuSheet, named: str) -> None:
    """Refuse FP8 on a kind of GPU that cannot run it, before any such GPU is there; nothing without FP8.

    Args:
        gpu: its data sheet. Of one without a compute capability only is known whether it has any FP8.
        named: what named this kind of GPU.

    Raises:
        ConfigError: it has no FP8, or not that recipe.
    """
    if fp8 is None:
        return
    reason = obstacle(fp8.recipe, gpu.capability, None) if gpu.capability else None
    if reason is None and gpu.fp8_tflops is None:
        reason = f"it has no FP8 (fp8_tflops of its file is null); {_INSTEAD}"
    if reason is not None:
        raise ConfigError(f"training.fp8.recipe: {fp8.recipe} cannot run on {gpu.name} ({named}): {reason}")


def obstacle(recipe: str, capability: tuple[int, int], cuda: str | None, instead: str = _INSTEAD) -> str | None:
    """Why a GPU cannot run `recipe`, and what it can; None when it can.

    Args:
        capability: the device's compute capability.
        cuda: the CUDA version that torch was built for, "12.8"; None = not known, and taken to be new enough.
        instead: how to do without FP8.
    """
    reason = _obstacle(recipe, capability, cuda)
    if reason is None:
        return None
    usable = [other for other in _CAPABILITY if _obstacle(other, capability, cuda) is None]
    return f"{reason}; " + (f"use recipe {' or '.join(usable)}, or " if usable else "") + instead


def _obstacle(recipe: str, capability: tuple[int, int], cuda: str | None) -> str | None:
    least, present = _CAPABILITY[recipe], ".".join(map(str, capability))
    if capability < least:
        return f"recipe {recipe} needs compute capability {least[0]}.{least[1]} or higher, this one has {present}"
    if recipe == "mxfp8" and capability >= _NO_MXFP8:
        return f"Transformer Engine has no recipe mxfp8 for compute capability {present}"
    version = _CUDA.get(recipe, (0, 0))
    if cuda is not None and tuple(map(int, cuda.split(".")[:2])) < version:
        return f"recipe {recipe} needs torch built for CUDA {version[0]}.{version[1]} or newer, not {cuda}"
    return None
