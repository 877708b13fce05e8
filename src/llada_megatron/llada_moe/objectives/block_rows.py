"""Rows of block diffusion: which block each position is in, and the text behind its noisy copy."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llada_megatron.llada_moe.data.batch import Row


def blocks_of(boundaries: NDArray[np.int32], size: int) -> NDArray[np.int64]:
    """The number of the block of each position, `[seq]`; blocks are counted from the start of each segment."""
    import numpy as np

    lengths = np.diff(boundaries).astype(np.int64)
    counts = -(-lengths // size)
    first = np.repeat(np.cumsum(counts) - counts, lengths)
    return first + (np.arange(boundaries[-1]) - np.repeat(boundaries[:-1].astype(np.int64), lengths)) // size


def doubled_row(noisy: Row, tokens: NDArray[np.int64]) -> Row:
    """`[x_t ; x_0]`, of twice the length of a masked sequence: its text follows it, with the same segments, and nothing
    there is supervised."""
    import numpy as np

    length = len(tokens)
    return replace(
        noisy,
        inputs=np.concatenate([noisy.inputs, tokens]),
        labels=np.concatenate([noisy.labels, tokens]),
        weights=np.concatenate([noisy.weights, np.zeros(length, noisy.weights.dtype)]),
        boundaries=np.concatenate([noisy.boundaries, noisy.boundaries[1:] + np.int32(length)]),
        drafted=None if noisy.drafted is None else np.concatenate([noisy.drafted, np.zeros(length, bool)]),
    )
