"""Passes over windows whose shape is fixed: what `windows` computes, on buffers that keep their addresses.

Everything that the layers do in such a pass follows from its shape alone. What changes from step to step (tokens,
positions, how many keys each sees, which rows of logits are wanted) is read from one buffer on the device, so that the
kernels of one pass serve every later pass of the shape: a CUDA graph replays them without any Python.

Padding adds nothing of its own. A shorter window repeats its last token, and a missing window repeats the last one, so
that what the repetition computes and keeps is what the original computes and keeps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from llada_megatron.llada_moe.model.transfer import pinned
from llada_megatron.llada_moe.model.windows import KeyValues


@dataclass(frozen=True)
class PassShape:
    """All that the kernels of a pass depend on."""

    windows: int
    width: int
    """Positions of each window."""
    keys: int
    """Keys that each window's queries are multiplied with, seen or not; without kept keys the window's own."""
    rows: int
    """Rows of logits; 0 = the pass returns none."""
    in_order: bool
    """The windows are those of the first slots of the memory, in their order: their keys lie there side by side."""

    @property
    def positions(self) -> int:
        """Positions that run."""
        return self.windows * self.width

    @cached_property
    def sizes(self) -> list[int]:
        """Lengths of the parts of the input buffer: tokens, positions, keys seen, slots, rows."""
        return [self.positions] * 3 + [self.windows, self.rows]


class FixedWindows:
    """The windows of all passes of one shape; stands where a pass has its `Windows`."""

    def __init__(
        self, shape: PassShape, memory: KeyValues | None, capacity: int, block: int | None, device: torch.device
    ) -> None:
        """`capacity`: no position reaches it; `block`: block size of the attention, None = all keys are seen."""
        self.shape, self.memory, self.capacity, self.block = shape, memory, capacity, block
        self.inputs = torch.zeros(sum(shape.sizes), dtype=torch.int64, device=device)
        self.tokens, self.positions, self.seen, self.slots, self.rows = self.inputs.split(shape.sizes)
        self.angles: torch.Tensor | None = None
        """The table of rotary angles that the pass reads, held here because a captured pass knows its address only."""
        self._bias: torch.Tensor | None = None

    def fill(self, contents: torch.Tensor) -> None:
        """Put the contents of a pass, int64 on the host, into the buffer; the host does not wait."""
        self.inputs.copy_(pinned(contents), non_blocking=True)

    def renew(self) -> None:
        """Forget what the layers of one pass shared, since the next pass must compute it anew."""
        self._bias = None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int, scale: float | None
    ) -> torch.Tensor:
        """Attention of a layer, which keeps the keys and values of the pass before it reads any.

        Args:
            query: `[1, heads, positions, head_dim]`.
            key: `[1, kv_heads, positions, head_dim]`; `value` the same.
            layer: number of the layer.
            scale: of the scores; None = 1 / sqrt(head_dim).

        Returns:
            `[1, heads, positions, head_dim]`.
        """
        groups = query.size(1) // key.size(1)
        keys, values = self._keys(key, value, layer)
        if self._bias is None:
            self._bias = self._make_bias(groups, query.dtype)
        # The heads that share keys stand as more queries, since fused kernels take a bias or shared keys, not both.
        queries = self._apart(query).unflatten(1, (-1, groups)).flatten(2, 3)
        out = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=self._bias, scale=scale)
        return out.unflatten(2, (groups, -1)).flatten(1, 2).transpose(0, 1).flatten(1, 2)[None]

    def _keys(self, key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that the windows meet, each `[windows, kv_heads, keys, head_dim]`."""
        if self.memory is None:
            return self._apart(key), self._apart(value)
        kept = self.memory.layer(layer, key)
        slot = self.slots.repeat_interleave(self.shape.width, output_size=self.shape.positions)
        for place, new in zip(kept, (key, value), strict=True):
            place[slot, :, self.positions] = new[0].transpose(0, 1)
        reached = kept[..., : self.shape.keys, :]
        keys, values = reached[:, : self.shape.windows] if self.shape.in_order else reached.index_select(1, self.slots)
        return keys, values

    def _apart(self, part: torch.Tensor) -> torch.Tensor:
        """`[1, heads, positions, head_dim]` -> `[windows, heads, width, head_dim]`."""
        return part[0].unflatten(1, (self.shape.windows, self.shape.width)).transpose(0, 1)

    def _make_bias(self, groups: int, dtype: torch.dtype) -> torch.Tensor:
        """What the queries add to their scores, `[windows, 1, queries, keys]`: 0 where a key is seen, else -inf.

        One row stands for all queries of a window where they see the same keys.
        """
        seen = self.seen.view(self.shape.windows, 1, self.shape.width, 1)
        seen = seen[:, :, :1] if self.block is None else seen.repeat(1, 1, groups, 1)
        hidden = torch.arange(self.shape.keys, device=seen.device) >= seen
        return torch.zeros(hidden.shape, dtype=dtype, device=seen.device).masked_fill_(hidden, float("-inf"))
