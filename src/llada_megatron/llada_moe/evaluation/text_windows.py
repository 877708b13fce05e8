"""Windows of text for a routing trace: cut from documents, masked, and what is known of each position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class TextWindow:
    """Consecutive documents of one source."""

    tokens: NDArray[np.int64]
    """`[seq]`."""
    boundaries: NDArray[np.int64]
    """Starts of the documents in the window and its end: ascending, 0 first, seq last."""
    source: int


def cut_windows(documents: Iterator[NDArray[np.int64]], length: int, count: int, source: int) -> Iterator[TextWindow]:
    """Up to `count` windows of consecutive documents."""
    tokens, starts, made = np.empty(0, np.int64), [], 0
    for document in documents:
        if len(document) == 0:
            continue
        starts.append(len(tokens))
        tokens = np.concatenate([tokens, document])
        while len(tokens) >= length:
            if made == count:
                return
            inside = [start for start in starts if 0 < start < length]
            yield TextWindow(tokens[:length], np.array([0, *inside, length]), source)
            made += 1
            tokens, starts = tokens[length:], [start - length for start in starts if start >= length]


def draw_mask(length: int, ratio: float, key: tuple[int, ...]) -> NDArray[np.bool_]:
    """`[length]`, of which the share `ratio` is true."""
    order = np.random.Generator(np.random.Philox(np.random.SeedSequence(key))).permutation(length)
    return order < round(ratio * length)


def window_facts(
    window: TextWindow, masked: NDArray[np.bool_], ratio: int, block_size: int, number: int
) -> tuple[NDArray, ...]:
    """Of each position of window `number`: ratio, masked, token, place in its block, its block, source, window."""
    length = len(window.tokens)
    starts, ends = window.boundaries[:-1], window.boundaries[1:]
    lengths = ends - starts
    offset = np.arange(length) - np.repeat(starts, lengths)
    left = np.repeat(ends, lengths) - np.arange(length)
    position = offset % block_size
    first = np.arange(length) - position
    whole = left + position >= block_size
    block = np.where(whole, number * length + first, -1)
    return (
        np.full(length, ratio, np.int16),
        masked,
        window.tokens,
        position.astype(np.int32),
        block.astype(np.int64),
        np.full(length, window.source, np.int16),
        np.full(length, number, np.int32),
    )
