"""Core attention over a pattern: the part of Megatron's SelfAttention between the projections."""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from llada_megatron.llada_moe.model.patterns import FULL, AttentionPattern, Band, Segment, bands, segments
from llada_megatron.llada_moe.model.windows import Window, Windows

QUERIES_AT_ONCE = 256
"""Small blocks are attended to in bands of about this many queries; larger blocks one by one."""


class PatternAttention(MegatronModule):
    """Softmax attention inside each segment: full, causal, or full inside blocks and causal between them.

    Under context parallelism a rank holds a contiguous slice of the queries; keys and values are gathered over the
    group (their gradients reduce-scattered), so that any pattern is exact. Queries are attended to band by band, each
    with the keys up to its last block's end; no mask larger than one band is ever built, and none at all for full
    attention.
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

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | Windows | None,
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
            key, value = (
                gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=True, group=self.context_group)
                for part in (key, value)
            )
        first = self.context_group.rank() * query.size(0)
        q, k, v = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        if isinstance(attention_mask, Windows):
            out = self._attend_windows(q, k, v, attention_mask)
        elif attention_mask is None or attention_mask.numel() == q.size(0) + 1:
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

    def _attend_windows(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, windows: Windows) -> torch.Tensor:
        """Each window with the keys of its sequence; `[1, heads, total, head_dim]`."""
        kept = None if windows.memory is None else windows.memory.layer(self.layer_number, k)
        if kept is not None:
            windows.keep(kept, k, v)
        parts = []
        for run in windows.runs(self.pattern.block):
            window, count = run.windows[0], len(run.windows)
            own = slice(run.offset, run.offset + window.width * count)
            if kept is None:
                keys, values = k[:, :, own], v[:, :, own]
            else:
                keys, values = kept[:, window.slot : window.slot + count, :, : run.keys]
            if count == 1:
                parts.append(self._attend(q[:, :, own], keys, values, window.first, 0))
            else:
                together = q[0, :, own].unflatten(1, (count, window.width)).transpose(0, 1)
                out = self._product(together, keys, values, attn_mask=run.mask)
                parts.append(out.transpose(0, 1).flatten(1, 2)[None])
            if window.shadows:
                shadow = slice(own.stop, own.stop + window.shadows)
                keys, values = torch.cat([keys, k[:, :, shadow]], 2), torch.cat([values, v[:, :, shadow]], 2)
                parts.append(self._product(q[:, :, shadow], keys, values, attn_mask=shadow_mask(window, q.device)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_start: int, k_start: int) -> torch.Tensor:
        """One segment's keys and the local part of its queries; the starts are positions in the sequence."""
        block = self.pattern.block
        if block is None:
            return self._product(q, k, v)
        if block == 1 and q.size(2) == k.size(2):
            return self._product(q, k, v, is_causal=True)
        offset, span = q_start - k_start, block * max(1, QUERIES_AT_ONCE // block)
        parts = []
        for band in bands(offset, offset + q.size(2), k.size(2), block, span):
            mine = q[:, :, band.start - offset : band.stop - offset]
            mask = band_mask(band, k.size(2), block, span, q)
            parts.append(self._product(mine, k[:, :, : band.keys], v[:, :, : band.keys], attn_mask=mask))
        return torch.cat(parts, dim=2)

    def _product(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **pattern: Any) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, scale=self.softmax_scale, enable_gqa=q.size(1) != k.size(1), **pattern
        )


def band_mask(band: Band, length: int, block: int, span: int, like: torch.Tensor) -> torch.Tensor | None:
    """What the band's queries add to their scores, `[queries, keys]`; None where all see the same keys."""
    if band.start // block == (band.stop - 1) // block:
        return None
    past = max(1024, 1 << (length - 1).bit_length())  # few sizes, so that documents of any length share one mask
    mask = _widest_mask(block, span, past, like.dtype, like.device)
    return mask[band.start - band.first : band.stop - band.first, past - band.first : past - band.first + band.keys]


def shadow_mask(window: Window, device: torch.device) -> torch.Tensor:
    """What the shadows of a window see: bool `[shadows, keys + shadows]`, false at each one's own position."""
    seen = torch.ones(window.shadows, window.keys + window.shadows, dtype=torch.bool, device=device)
    own = torch.arange(window.shadows, device=device)
    seen[own, window.shadow_first + own] = False
    return seen


@functools.lru_cache(maxsize=8)
def _widest_mask(block: int, span: int, past: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """`[span, past + span]`: a band that `past` keys precede; every other band's is a view of it, so that the masks
    kept for the backward pass of all layers are one tensor."""
    with torch.inference_mode(False):
        rows = torch.arange(span, device=device) // block
        columns = torch.arange(-past, span, device=device) // block
        hidden = columns[None, :] > rows[:, None]
        return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
