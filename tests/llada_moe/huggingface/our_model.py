"""Our model with the weights of a Hugging Face checkpoint, as one process without files has it."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from llada_megatron.parallel import device

device.install()

from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402

from llada_megatron.llada_moe.config.layout import LayoutConfig  # noqa: E402
from llada_megatron.llada_moe.config.model import ModelConfig  # noqa: E402  # noqa: E402
from llada_megatron.llada_moe.huggingface.formats.table import Format  # noqa: E402
from llada_megatron.llada_moe.huggingface.mapping import mappings, merge  # noqa: E402
from llada_megatron.llada_moe.model.patterns import FULL, whole_sequences  # noqa: E402
from llada_megatron.llada_moe.model.transformer import build_model  # noqa: E402
from llada_megatron.parallel import sharded_state  # noqa: E402
from llada_megatron.parallel.build import transformer_config  # noqa: E402


def canonical(table: Format, model: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every weight in whole, by its name in a sharded checkpoint."""
    whole: dict[str, torch.Tensor] = {}
    for mapping in mappings(table, model):
        unit, weight = mapping.unit, mapping.unit.weight
        for part in mapping.parts:
            assert tuple(tensors[part.name].shape) == part.shape, part
        merged = merge(unit, [tensors[part.name][part.start : part.stop] for part in mapping.parts], model)
        assert tuple(merged.shape) == unit.shape, unit.name
        target = whole.setdefault(weight.key, torch.full(weight.global_shape, torch.nan, dtype=merged.dtype))
        target[unit.index][unit.start : unit.stop] = merged
    return whole


@torch.no_grad()
def logits(model, weights, tokens, pattern=FULL):
    """Our logits `[batch, seq, vocab]` of `tokens` `[batch, seq]`; the process groups of one rank must exist."""
    config = transformer_config(model, LayoutConfig())
    ours = build_model(model, config, pattern=pattern).eval()
    filled = set()
    for entry in nested_values(sharded_state.apply_factories_copy(ours)):
        if isinstance(entry, ShardedTensor) and entry.data is not None:
            axes = entry.prepend_axis_num
            whole = weights[entry.key][entry.global_offset[:axes]]
            places = zip(entry.global_offset[axes:], entry.data.shape, strict=True)
            entry.data.copy_(whole[tuple(slice(start, start + count) for start, count in places)])
            filled.add(entry.key)
    assert filled == set(weights)
    rows = torch.ones_like(tokens, dtype=torch.bool)
    return ours(tokens, whole_sequences(*tokens.shape), rows=rows).view(*tokens.shape, -1)
