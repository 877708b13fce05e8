"""Why a model gives logits that are no numbers: asked once sampling has met one, since a search reads every weight."""

from __future__ import annotations

import re
from typing import Any

import torch
from megatron.core import parallel_state

from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.finite import first_not_finite
from llada_megatron.llada_moe.model.transformer import DiffusionTransformer
from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


def not_finite(loaded: LoadedModel) -> CheckpointError:
    """The error of a model whose logits are NaN or infinite, with the first weight that is (collective).

    Every tensor and pipeline rank of the replica has the same statistics, and so calls this in the same step. Experts
    that lie on other replicas are not searched.
    """
    fault = f"{loaded.path}: the model's logits are not finite numbers, and every token would be noise"
    found: list[str | None] = [_first_weight(loaded.model)]
    group = parallel_state.get_model_parallel_group()
    if group.size() > 1:
        found *= group.size()
        torch.distributed.all_gather_object(found, found[0], group=group)
    place = next(filter(None, found), None)
    if place is not None:
        return CheckpointError(
            f"{fault}: of its weights, {place}. The checkpoint was damaged before it was written, or the training had "
            "diverged: take an earlier one, or import an undamaged copy"
        )
    return CheckpointError(
        f"{fault}. The weights of this replica are finite: those of experts on another may not be, or activations grow "
        f"beyond {loaded.model.config.params_dtype}; convert the checkpoint to fp32 to see which"
    )


def _first_weight(model: DiffusionTransformer) -> str | None:
    """Name, position on this rank and value of the first weight of this rank that is NaN or infinite, or None."""
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        found = first_not_finite(weight.detach())
        if found is not None:
            return f"{_whole_name(model, name)} is {found[1]} at {list(found[0])}"
    return None


def _whole_name(model: DiffusionTransformer, name: str) -> str:
    """The name with the number that a layer has in the whole model, in the place of its number on this stage."""
    match = _LAYER.match(name)
    if match is None:
        return name
    layer: Any = model.decoder.layers[int(match[1])]
    return f"decoder.layers.{layer.layer_number - 1}.{name[match.end() :]}"
