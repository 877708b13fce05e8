"""Passes over parts of sequences: which positions run, which keys they see, and the keys kept between passes.

A pass packs the windows of several sequences one after another into `[1, total]`, so that no padding is run. This is
the attention pattern of sampling; that of whole sequences is in `patterns`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from llada_megatron.llada_moe.model.transfer import to_device


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
    drafted: int = 0
    """So many of its last positions see all these keys under causal attention, too: a block of masks behind a text that
    is read causally."""

    @property
    def total(self) -> int:
        """Positions that run."""
        return self.width + self.shadows

    @property
    def positions(self) -> torch.Tensor:
        """Positions in the sequence of the window and its shadows: `[total]` int64."""
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
class Run:
    """Windows whose queries meet their keys in one product: equally wide, their memory side by side."""

    windows: Sequence[Window]
    offset: int
    """Where the first one begins in the packed pass."""
    keys: int
    """The most that one of them sees."""
    mask: torch.Tensor | None
    """bool `[windows, 1, 1, keys]`: which keys each sees; None = all of them, or a pattern within the one window."""


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

    def runs(self, block: int | None) -> list[Run]:
        """The windows, cut into stretches that one product serves, under attention in blocks of `block`."""
        if block not in self._runs:
            self._runs[block] = [self._run(first, count, block) for first, count in self._stretches(block)]
        return self._runs[block]

    def keep(self, kept: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the windows' keys and values `[1, kv_heads, total, head_dim]` into a layer's memory."""
        if len(self.windows) == 1:
            window = self.windows[0]
            place = kept[:, window.slot, :, window.first : window.first + window.width]
            place[0], place[1] = keys[0, :, : window.width], values[0, :, : window.width]
            return
        slot, position, index = self._kept_tokens
        kept[0][slot, :, position] = keys[0, :, index].transpose(0, 1)
        kept[1][slot, :, position] = values[0, :, index].transpose(0, 1)

    @cached_property
    def _runs(self) -> dict[int | None, list[Run]]:
        return {}

    def _run(self, first: int, count: int, block: int | None) -> Run:
        windows = self.windows[first : first + count]
        if count == 1:
            return Run(windows, self.offsets[first], windows[0].keys, None)
        keys = torch.tensor([_keys_of_block(window, block) for window in windows])
        most = int(keys.max())
        seen = torch.arange(most) < keys[:, None, None, None]
        mask = None if bool(seen.all()) else to_device(seen, self.positions.device)
        return Run(windows, self.offsets[first], most, mask)

    def _stretches(self, block: int | None) -> list[tuple[int, int]]:
        """(first, count) of consecutive windows that are alike."""
        found: list[tuple[int, int]] = []
        for number, window in enumerate(self.windows):
            before = self.windows[number - 1] if number else None
            if before is not None and self.memory is not None and _alike(before, window, block):
                found[-1] = (found[-1][0], found[-1][1] + 1)
            else:
                found.append((number, 1))
        return found

    @cached_property
    def _kept_tokens(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Slot, position and place in the pass of the tokens whose keys are kept: all but the shadows."""
        where = self.positions.device
        slot = torch.cat([torch.full((window.width,), window.slot) for window in self.windows])
        index = torch.cat([at + torch.arange(w.width) for at, w in zip(self.offsets, self.windows, strict=False)])
        index = to_device(index, where)
        return to_device(slot, where), self.positions[index], index

    def block_numbers(self, size: int) -> tuple[torch.Tensor, int]:
        """Number the blocks of `size` positions, counted from the start of each sequence; shadows have their own.

        Returns:
            The block of each position of the pass `[total]`, and how many there are.
        """
        if size not in self._numbered:
            self._numbered[size] = self._number(size)
        return self._numbered[size]

    @cached_property
    def _numbered(self) -> dict[int, tuple[torch.Tensor, int]]:
        return {}

    def _number(self, size: int) -> tuple[torch.Tensor, int]:
        numbers, count = [], 0
        for window in self.windows:
            own = torch.arange(window.first, window.first + window.width) // size
            shadow = torch.arange(window.shadow_first, window.shadow_first + window.shadows) // size
            for part in (own, shadow):
                if part.numel():
                    numbers.append(part - part[0] + count)
                    count += int(part[-1] - part[0]) + 1
        return to_device(torch.cat(numbers), self.positions.device), count


def _alike(one: Window, other: Window, block: int | None) -> bool:
    """Whether two windows are equally wide, their memory lies side by side, and all queries of each see the same."""
    beside = (one.width, one.slot) == (other.width, other.slot - 1) and not (one.shadows or other.shadows)
    return beside and one.drafted == other.drafted and _in_one_block(one, block) and _in_one_block(other, block)


def _in_one_block(window: Window, block: int | None) -> bool:
    if block is None or window.drafted == window.width:
        return True
    return not window.drafted and window.first // block == (window.first + window.width - 1) // block


def _keys_of_block(window: Window, block: int | None) -> int:
    """Keys that a window inside one block sees."""
    return window.keys if block is None or window.drafted else min(window.keys, (window.first // block + 1) * block)
