"""Passes over parts of sequences: which positions run, which keys they see, and the keys kept between passes.

A pass packs the windows of several sequences one after another into `[1, total]`, so that no padding is run. This is
the attention pattern of sampling; that of whole sequences is in `patterns`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Window:
    """Positions [first, first + width) of one sequence, and the keys [0, keys) that they see.

    `shadows` positions from `shadow_first` on run a second time, behind the window, as what the pass puts there (mask
    tokens): each shadow sees these keys but the one at its own position, and all shadows; nothing sees a shadow, and
    its keys are not kept (WINO, arXiv 2507.18578).
    """

    slot: int
    """Where the keys and values of the sequence are kept."""
    first: int
    width: int
    keys: int
    shadow_first: int = 0
    shadows: int = 0

    @property
    def total(self) -> int:
        """Positions that run."""
        return self.width + self.shadows

    @property
    def positions(self) -> torch.Tensor:
        """Of the window and its shadows in the sequence: `[total]` int64."""
        own = torch.arange(self.first, self.first + self.width)
        if not self.shadows:
            return own
        return torch.cat([own, torch.arange(self.shadow_first, self.shadow_first + self.shadows)])


class KeyValues:
    """Keys (rotated) and values of `slots` sequences of up to `capacity` positions, layer by layer.

    A layer's memory comes with its first write. What was never written is zero and must not be attended to.
    """

    def __init__(self, slots: int, capacity: int) -> None:
        self.slots = slots
        self.capacity = capacity
        self._layers: dict[int, torch.Tensor] = {}

    def layer(self, number: int, like: torch.Tensor) -> torch.Tensor:
        """Memory `[2, slots, kv_heads, capacity, head_dim]` of a layer, for keys like `[1, kv_heads, total, dim]`."""
        kept = self._layers.get(number)
        if kept is None:
            shape = (2, self.slots, like.size(1), self.capacity, like.size(3))
            kept = self._layers[number] = like.new_zeros(shape)
        return kept

    @property
    def nbytes(self) -> int:
        """Memory in use."""
        return sum(layer.nbytes for layer in self._layers.values())


@dataclass(frozen=True)
class Windows:
    """The windows of one pass; stands where whole sequences have their segment boundaries."""

    windows: Sequence[Window]
    memory: KeyValues | None
    """None: every window is a whole sequence from position 0 to `keys`, and nothing is kept."""
    positions: torch.Tensor
    """`[total]` int64, on the model's device."""
    capacity: int
    """No position reaches it."""

    @cached_property
    def offsets(self) -> list[int]:
        """Where each window begins in the packed pass."""
        offsets = [0]
        for window in self.windows:
            offsets.append(offsets[-1] + window.total)
        return offsets

    def block_numbers(self, size: int) -> tuple[torch.Tensor, int]:
        """Number the blocks of `size` positions, counted from the start of each sequence; shadows have their own.

        Returns:
            The block of each position of the pass `[total]`, and how many there are.
        """
        numbers, count = [], 0
        for window in self.windows:
            own = torch.arange(window.first, window.first + window.width) // size
            shadow = torch.arange(window.shadow_first, window.shadow_first + window.shadows) // size
            for part in (own, shadow):
                if part.numel():
                    numbers.append(part - part[0] + count)
                    count += int(part[-1] - part[0]) + 1
        return torch.cat(numbers).to(self.positions.device), count
