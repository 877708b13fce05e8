"""Attention by Transformer Engine: all documents in one call of Megatron's TEDotProductAttention."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.llada_moe.model.attention.packed_documents import PackedDocuments
from llada_megatron.llada_moe.model.attention.packed_keys import cumulative_lengths, longest, packed_keys
from llada_megatron.llada_moe.model.attention.pattern_attention import PatternAttention


class EnginePatternAttention(PatternAttention):
    """The core attention of a model that is built from Transformer Engine's modules."""

    def __init__(self, config: TransformerConfig, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, layer_number, *args, **kwargs)
        self.engine = engine_class()(config, layer_number, self.softmax_scale, kwargs["pg_collection"])


@cache
def engine_class() -> type[torch.nn.Module]:
    """The class of `PatternAttention.engine`."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    class EngineAttention(TEDotProductAttention):
        """TEDotProductAttention that knows nothing of context ranks (keys are gathered before it) and has no state
        that a checkpoint would keep: that is of attention in FP8, which no run uses."""

        get_extra_state, set_extra_state = torch.nn.Module.get_extra_state, torch.nn.Module.set_extra_state

        def __init__(self, config: TransformerConfig, layer: int, scale: float | None, groups: Any) -> None:
            alone = copy.copy(config)
            alone.context_parallel_size = 1
            super().__init__(alone, layer, AttnMaskType.padding, "self", softmax_scale=scale, pg_collection=groups)

        def attend(
            self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedDocuments
        ) -> torch.Tensor:
            """Attend to all documents in one call; arguments and result as in `per_document.attend`."""
            out = self(**arguments(query, key, value, packed))
            return out.view(query.size(1), query.size(0), -1).transpose(0, 1).contiguous()

    return EngineAttention


def arguments(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedDocuments) -> dict[str, Any]:
    """What Megatron's TEDotProductAttention takes for these documents."""
    query, key, value = packed_keys(query, key, value, packed)
    queries, keys = packed.once(cumulative_lengths, query.device)
    most_queries, most_keys = packed.once(longest, query.device)
    return {
        "query": query,
        "key": key,
        "value": value,
        "attention_mask": None,
        "attn_mask_type": AttnMaskType.padding if packed.pattern.block is None else AttnMaskType.padding_causal,
        "packed_seq_params": PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=queries,
            cu_seqlens_kv=keys,
            max_seqlen_q=most_queries,
            max_seqlen_kv=most_keys,
        ),
    }
