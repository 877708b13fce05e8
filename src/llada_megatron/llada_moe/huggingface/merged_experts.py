"""Checkpoints in which the experts of a layer are one tensor, as training and sampling programs keep them.

| who writes it | tensors of a layer, each with the experts on axis 0 |
|---|---|
| dFactory (`scripts/moe_convertor.py`, `--mode merge`) | `mlp.experts.gate_proj`, `.up_proj`, `.down_proj` |
| dInfer (`tools/transfer.py`), LLaDA-MoE | `mlp.w1` (the gate's rows above those of up), `mlp.w2` (down) |

The values of each expert lie side by side in the file, so its tensors are views: nothing is copied.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from llada_megatron.llada_moe.huggingface.safetensors_header import TensorInfo

_STACKED = re.compile(r"(?P<mlp>.*\.mlp\.)(experts\.(?P<one>gate_proj|up_proj|down_proj)|(?P<fused>w1|w2))(\.weight)?")
_FUSED = {"w1": ("gate_proj", "up_proj"), "w2": ("down_proj",)}


def split_experts(tensors: Mapping[str, TensorInfo], experts: int) -> tuple[dict[str, TensorInfo], list[str]]:
    """The tensors with each expert's own under the names that published checkpoints give them.

    Args:
        tensors: by name.
        experts: how many experts a layer of the model has. Only tensors that hold as many are split.

    Returns:
        the tensors by name, and the names of the merged ones that they were split from.
    """
    found: dict[str, TensorInfo] = {}
    merged: list[str] = []
    for tensor in tensors.values():
        parts = {part.name: part for part in _parts(tensor, experts)}
        if parts and not parts.keys() & tensors.keys():
            merged.append(tensor.name)
            found |= parts
        else:
            found[tensor.name] = tensor
    return found, merged


def _parts(tensor: TensorInfo, experts: int) -> Iterator[TensorInfo]:
    """The tensors of single experts in a merged one, `[experts, rows, columns]`; none if it is no merged one."""
    match = _STACKED.fullmatch(tensor.name)
    if match is None or len(tensor.shape) != 3 or tensor.shape[0] != experts:
        return
    names = _FUSED[match["fused"]] if match["fused"] else (match["one"],)
    _, rows, columns = tensor.shape
    if rows % len(names):
        return
    shape = (rows // len(names), columns)
    size = math.prod(shape) * tensor.dtype.itemsize
    for number in range(experts * len(names)):
        expert, part = divmod(number, len(names))
        name = f"{match['mlp']}experts.{expert}.{names[part]}.weight"
        yield replace(tensor, name=name, shape=shape, offset=tensor.offset + number * size, size=size)
