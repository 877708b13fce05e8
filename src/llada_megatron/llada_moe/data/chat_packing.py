"""Which conversations stand in one window of training, decided once for all epochs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.data.packing import mix_all


def shuffled(count: int, seed: int, set_number: int) -> NDArray[np.int64]:
    """range(count) in an order drawn from (seed, set)."""
    keys = mix_all(np.arange(count, dtype=np.uint64) ^ mix_all(np.array([seed, set_number], np.uint64)).sum())
    return np.argsort(keys, kind="stable")


def fill_windows(lengths: NDArray[np.int64], window: int) -> NDArray[np.int64]:
    """Put conversations into windows one after the other, a new window where the next does not fit.

    Args:
        lengths: `[conversations]`, tokens of each, none above `window`.
        window: tokens of a window.

    Returns:
        `[windows + 1]`: window w holds the conversations from the w-th number to before the next.
    """
    ends = np.concatenate([[0], np.cumsum(lengths)])
    first, firsts = 0, [0]
    while first < len(lengths):
        first = int(np.searchsorted(ends, ends[first] + window, side="right")) - 1
        firsts.append(first)
    return np.array(firsts, np.int64)
