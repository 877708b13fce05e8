"""Equal bins of (0, 1] for the mask ratios of sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BINS = 10


def bin_of(mask_ratio: Tensor, bins: int = BINS) -> Tensor:
    """Number of the bin of each ratio, int64 of the same shape; bin i is (i / bins, (i + 1) / bins].

    In float32 a ratio such as 0.2 lies on its edge, not beyond it.
    """
    return ((mask_ratio.float() * bins).ceil().long() - 1).clamp_(0, bins - 1)


def bin_names(bins: int = BINS) -> list[str]:
    """Names of the bins, as `0.1-0.2`."""
    return [f"{i / bins:.2g}-{(i + 1) / bins:.2g}" for i in range(bins)]
