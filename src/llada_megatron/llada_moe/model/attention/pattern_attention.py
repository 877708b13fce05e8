"""Core attention over a pattern: the part of Megatron's SelfAttention between the projections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.llada_moe.model.attention import decomposed, flex, per_document, varlen
from llada_megatron.llada_moe.model.attention.backends import Backend, attention_backend, told
from llada_megatron.llada_moe.model.attention.doubled_documents import DoubledDocuments
from llada_megatron.llada_moe.model.attention.packed_documents import PackedBatches, PackedDocuments
from llada_megatron.llada_moe.model.attention.window_attention import attend_windows
from llada_megatron.llada_moe.model.context_slices import held_runs, in_order
from llada_megatron.llada_moe.model.fixed_windows import FixedWindows
from llada_megatron.llada_moe.model.patterns import FULL, AttentionPattern
from llada_megatron.llada_moe.model.windows import Windows


class PatternAttention(MegatronModule):
    """Softmax attention inside each segment: full, causal, or full inside blocks and causal between them; or over a
    noisy and a clean half of the sequence (see `AttentionPattern.doubled`).

    Under context parallelism a rank holds the queries that `context_slices` says; keys and values are gathered over the
    group (their gradients reduce-scattered), so that any pattern is exact.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        pattern: AttentionPattern = FULL,
    ) -> None:
        """`pattern`: who sees whom; the model sets another one between steps (`DiffusionTransformer.use_pattern`)."""
        super().__init__(config=config)
        self.pattern = pattern
        self.layer_number = layer_number
        self.context_group = pg_collection.cp
        self.softmax_scale = softmax_scale
        self.packed_batches = PackedBatches()
        self.engine: Any = None
        """Transformer Engine's attention, in a model that is built from its modules (see `engine_attention`)."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | Windows | FixedWindows | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: `[seq, batch, heads, head_dim]`, this rank's positions.
            key: `[seq, batch, kv_heads, head_dim]`, likewise; `value` the same.
            attention_mask: segment boundaries of the whole sequences (see `patterns`); None = whole sequences; or the
                windows of a pass over parts of sequences.

        Returns:
            `[seq, batch, heads * head_dim]`.
        """
        if self.context_group.size() > 1:
            key, value = (self._gathered(part) for part in (key, value))
        if isinstance(attention_mask, Windows | FixedWindows):
            q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
            if isinstance(attention_mask, FixedWindows):
                out = attention_mask.attend(q, k, v, self.layer_number, self.softmax_scale)
            else:
                out = attend_windows(q, k, v, attention_mask, self.pattern.block, self.layer_number, self.softmax_scale)
            return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)
        packed = self.packed_batches.of(
            attention_mask,
            self.pattern,
            batch=query.size(1),
            positions=key.size(0),
            runs=held_runs(key.size(0), self.context_group.rank(), self.context_group.size(), self.pattern),
        )
        return self._attend(query, key, value, packed)

    def _gathered(self, part: torch.Tensor) -> torch.Tensor:
        """Whole sequences of keys or values, in order."""
        whole = gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=True, group=self.context_group)
        return in_order(whole, self.context_group.size(), self.pattern)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: PackedDocuments | DoubledDocuments
    ) -> torch.Tensor:
        chosen = attention_backend(
            self.pattern,
            query.device.type,
            query.dtype,
            head_dim=query.size(3),
            engine=self.engine is not None,
            split=self.context_group.size() > 1,
        )
        told(chosen)
        if chosen.backend is Backend.ENGINE:
            return self.engine.attend(query, key, value, packed)
        attend = _ATTEND[chosen.backend]
        return attend(query, key, value, packed, self.softmax_scale)


_ATTEND: dict[Backend, Callable[..., torch.Tensor]] = {
    Backend.PER_DOCUMENT: per_document.attend,
    Backend.VARLEN: varlen.attend,
    Backend.FLEX: flex.attend,
    Backend.DECOMPOSED: decomposed.attend,
}
