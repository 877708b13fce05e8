"""Core attention over a pattern: the part of Megatron's SelfAttention between the projections."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.llada_moe.model.patterns import Segment, segments


class PatternAttention(MegatronModule):
    """Softmax attention inside each segment, full or causal.

    Under context parallelism a rank holds a contiguous slice of the queries; keys and values are gathered over the
    group (their gradients reduce-scattered), so that any pattern is exact. No mask larger than one segment is ever
    built, and none at all for full attention.
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
    ) -> None:
        super().__init__(config=config)
        self.causal = attn_mask_type == AttnMaskType.causal
        self.context_group = pg_collection.cp
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: `[seq, batch, heads, head_dim]`, this rank's positions.
            key: `[seq, batch, kv_heads, head_dim]`, likewise; `value` the same.
            attention_mask: segment boundaries of the whole sequences (see `patterns`); None = whole sequences.

        Returns:
            `[seq, batch, heads * head_dim]`.
        """
        if self.context_group.size() > 1:
            key, value = (
                gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=True, group=self.context_group)
                for part in (key, value)
            )
        first = self.context_group.rank() * query.size(0)
        q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        if attention_mask is None or attention_mask.numel() == q.size(0) + 1:
            out = self._attend(q, k, v, first, 0)
        else:
            out = self._attend_segments(q, k, v, first, segments(attention_mask, k.size(2)))
        return out.permute(2, 0, 1, 3).reshape(query.size(0), query.size(1), -1)

    def _attend_segments(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, parts: list[Segment]
    ) -> torch.Tensor:
        """Segment by segment; every local query lies in exactly one. Shapes `[batch, heads, seq, head_dim]`."""
        rows: list[list[torch.Tensor]] = [[] for _ in range(q.size(0))]
        for part in parts:
            start, stop = max(part.start, first), min(part.stop, first + q.size(2))
            if start < stop:
                row = slice(part.row, part.row + 1)
                mine = q[row, :, start - first : stop - first]
                rows[part.row].append(
                    self._attend(
                        mine, k[row, :, part.start : part.stop], v[row, :, part.start : part.stop], start, part.start
                    )
                )
        return torch.cat([torch.cat(row, dim=2) for row in rows])

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_start: int, k_start: int) -> torch.Tensor:
        """One rectangle of attention; the starts are positions in the sequence, for the causal order."""
        whole = q_start == k_start and q.size(2) == k.size(2)
        mask = None
        if self.causal and not whole:
            rows = torch.arange(q_start, q_start + q.size(2), device=q.device)
            mask = rows[:, None] >= torch.arange(k_start, k_start + k.size(2), device=q.device)
        return torch.nn.functional.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=self.causal and whole,
            scale=self.softmax_scale,
            enable_gqa=q.size(1) != k.size(1),
        )
