"""Which experts each token went to, over passes of a model on text, and counts of it by anything known of a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RoutingTrace:
    """Choices of all routers for all rows; a row is a token of the text in one pass, at one mask ratio."""

    layers: Sequence[int]
    """Numbers (from 1) of the layers with experts."""
    experts: int
    choices: NDArray[np.int16]
    """`[layers, rows, top_k]`: the experts, ascending."""
    ratios: Sequence[float]
    """Mask ratios, ascending."""
    ratio: NDArray[np.int16]
    """`[rows]`: index into `ratios`."""
    masked: NDArray[np.bool_]
    """`[rows]`: the model saw a mask in its place."""
    tokens: NDArray[np.int64]
    """`[rows]`: the token of the text, also where it was masked."""
    position: NDArray[np.int32]
    """`[rows]`: position in the block, counted from the start of the document."""
    block: NDArray[np.int64]
    """`[rows]`: number of the block, of its own at each ratio; -1 in a block that the document or window cuts off."""
    block_size: int
    window: NDArray[np.int32]
    """`[rows]`: number of the window and ratio that the row ran in, from 0."""
    sources: Sequence[str]
    source: NDArray[np.int16]
    """`[rows]`: index into `sources`."""

    @property
    def rows(self) -> int:
        """Tokens times mask ratios."""
        return self.choices.shape[1]

    @property
    def top_k(self) -> int:
        """Experts of a token."""
        return self.choices.shape[2]

    def load(self, label: NDArray[np.integer] | None = None, groups: int = 1) -> NDArray[np.int64]:
        """Tokens per expert by a label of the rows: `[layers, groups, experts]`.

        Args:
            label: `[rows]`, from 0 to `groups` - 1, negative = left out; None = all rows in one group.
        """
        label = np.zeros(self.rows, np.int64) if label is None else np.asarray(label, np.int64)
        kept = label >= 0
        counts = np.empty((len(self.layers), groups, self.experts), np.int64)
        for layer, chosen in enumerate(self.choices):
            flat = (label[kept, None] * self.experts + chosen[kept]).ravel()
            counts[layer] = np.bincount(flat, minlength=groups * self.experts).reshape(groups, self.experts)
        return counts

    def maps(self, layer: int, rows: NDArray[np.integer]) -> NDArray[np.float32]:
        """Choices of some rows of the layer at this index as ones in zeros, `[rows, experts]`."""
        chosen = np.zeros((len(rows), self.experts), np.float32)
        np.put_along_axis(chosen, self.choices[layer, rows].astype(np.int64), 1.0, axis=1)
        return chosen


def distance(a: NDArray[np.integer], b: NDArray[np.integer]) -> float:
    """Total variation between two loads `[experts]`: the share of the tokens' choices that differs, 0 to 1.

    0 where one of them has no token.
    """
    if not a.sum() or not b.sum():
        return 0.0
    return float(np.abs(a / a.sum() - b / b.sum()).sum() / 2)


def distance_by_chance(whole: NDArray[np.integer], choices: int) -> float:
    """The distance that so many choices, drawn by the shares of a load `[experts]`, have from it on average.

    Each share's error is about normal with variance p (1 - p) / n, whose mean size is its deviation times sqrt(2 / pi).
    """
    if not choices or not whole.sum():
        return 0.0
    share = whole / whole.sum()
    return float(min(1.0, np.sqrt(2 * share * (1 - share) / (np.pi * choices)).sum() / 2))
