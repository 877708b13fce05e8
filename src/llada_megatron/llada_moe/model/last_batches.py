"""What layers need to know of a batch, made by the first of them and shared by all."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

Made = TypeVar("Made")


class LastBatches:
    """What was made of the last batches, by their boundaries.

    A pipeline stage has several batches under way, and runs layers of an earlier one again where activations are
    recomputed; megatron gives a layer nothing but tensors then, which is why boundaries are what identifies a batch.
    """

    def __init__(self, kept: int = 32) -> None:
        self._kept = kept
        self._made: OrderedDict[tuple[Hashable, ...], Any] = OrderedDict()

    def once(self, boundaries: torch.Tensor | None, facts: tuple[Hashable, ...], make: Callable[[], Made]) -> Made:
        """What `make` returned for the same boundaries and facts, or returns now."""
        key = (None if boundaries is None else boundaries.numpy().tobytes(), *facts)
        if key not in self._made:
            if len(self._made) == self._kept:
                self._made.popitem(last=False)
            self._made[key] = make()
        self._made.move_to_end(key)
        return self._made[key]
