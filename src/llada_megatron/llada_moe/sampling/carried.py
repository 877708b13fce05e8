"""What the reading of one step leaves for that of the next, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling.rows import Rows


class Carried:
    """Values of the rows that were read last, found again by the same sequence's row of the same position.

    A row is found only if its sequence has taken exactly one step since: what a finished sequence left in a slot is
    nobody's, and memory is that of one reading.
    """

    def __init__(self) -> None:
        self._keys: Tensor | None = None

    def remember(self, rows: Rows, *values: Tensor) -> None:
        """Replace what is remembered by values `[rows, ...]` of these rows."""
        key = _keys(rows)
        self._order = key.argsort()
        self._keys = key[self._order]
        self._stream, self._step = rows.stream, rows.step
        self._values = values

    def recall(self, rows: Rows) -> tuple[Tensor, list[Tensor]]:
        """Which rows are found, bool `[rows]` on the host, and their values; those of others are any row's.

        The values are an empty list before the first reading.
        """
        if self._keys is None or not self._keys.numel():
            return torch.zeros_like(rows.slot, dtype=torch.bool), []
        key = _keys(rows)
        place = torch.searchsorted(self._keys, key).clamp(max=self._keys.numel() - 1)
        before = self._order[place]
        found = (self._keys[place] == key) & (self._stream[before] == rows.stream)
        found &= self._step[before] + 1 == rows.step
        return found, [value[before.to(value.device)] for value in self._values]


def _keys(rows: Rows) -> Tensor:
    return (rows.slot << 32) + rows.position
