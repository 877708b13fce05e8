"""Drafts in which tokens are missing or too many, and what the model should say at each of their positions.

LLaDA2.2 (report): the longest common subsequence aligns the draft of a block with its text. A token that stays or is
replaced is labelled by the token of the text, one too many by DELETE, and one before which tokens of the text are
missing by INSERT, once: what is still missing after that is a matter of the next step. A block keeps its length: it is
filled up with masks, or loses its end. A mask may stand for any token of the text.

The report leaves open which of several alignments is taken. Here it is one that, after the most in common, masks among
them, keeps the most written tokens, and then replaces the most: what is put right where it stands needs no move. Masks
stand for the earliest tokens that they can, so that what is missing or too many is said behind them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Arrangement:
    """Which token each position of a draft shows, of a sequence whose text has moved inside its blocks."""

    source: NDArray[np.int64]
    """[seq], the position of the text that is shown, or whose surplus token is; -1 = nothing is left, a mask."""
    surplus: NDArray[np.bool_]
    """[seq], True = a token too many, which stands before `source`."""


@dataclass(frozen=True)
class Operations:
    """Token ids that stand for operations, and the mask."""

    delete_id: int
    insert_id: int
    mask_id: int


def arrange(blocks: NDArray[np.int64], missing: NDArray[np.bool_], surplus: NDArray[np.bool_]) -> Arrangement:
    """Leave tokens out and put others before them, block by block; blocks keep their lengths.

    Args:
        blocks: `[seq]`, the ascending number from 0 of each position's block.
        missing: `[seq]`, tokens of the text that are left out.
        surplus: `[seq]`, tokens before which another is put.
    """
    lengths = np.bincount(blocks)
    starts = np.cumsum(lengths) - lengths
    present = np.stack([surplus, ~missing], axis=1).ravel()  # of each token: one put before it, and itself
    owner = np.repeat(blocks, 2)
    before = np.cumsum(present) - present
    rank = before - before[2 * starts][owner]
    taken = present & (rank < lengths[owner])
    place, item = starts[owner[taken]] + rank[taken], np.flatnonzero(taken)
    source, added = np.full(len(blocks), -1, np.int64), np.zeros(len(blocks), bool)
    source[place], added[place] = item // 2, item % 2 == 0
    return Arrangement(source, added)


def edit_labels(drafts: NDArray[np.int64], texts: NDArray[np.int64], ids: Operations) -> NDArray[np.int64]:
    """What to predict at each position of drafts, all `[blocks, size]`: a token of the text, DELETE or INSERT."""
    size = drafts.shape[1]
    anchors = _anchors(drafts, texts, ids.mask_id)
    places = np.arange(size)
    known = anchors >= 0
    last = np.maximum.accumulate(np.where(known, places, -1), axis=1)  # the anchor at or before each position
    before = np.concatenate([np.full((len(drafts), 1), -1), last[:, :-1]], axis=1)
    reached = np.where(before >= 0, np.take_along_axis(anchors, before.clip(min=0), axis=1), -1)
    partner = reached + places - before  # of the text; what stands between two anchors is paired in order
    following = np.where(known, anchors, size)
    following = np.minimum.accumulate(following[:, ::-1], axis=1)[:, ::-1]
    paired = np.take_along_axis(texts, partner.clip(max=size - 1), axis=1)
    labels = np.where(partner < following, paired, ids.delete_id)
    inserted = np.where(partner < anchors, ids.insert_id, np.take_along_axis(texts, anchors.clip(min=0), axis=1))
    return np.where(known, inserted, labels)


def _anchors(drafts: NDArray[np.int64], texts: NDArray[np.int64], mask_id: int) -> NDArray[np.int64]:
    """The position of the text that each position of a draft has in common with it, -1 = none; `[blocks, size]`."""
    count, size = drafts.shape
    kept = drafts[:, :, None] == texts[:, None, :]
    masked = drafts == mask_id
    equal = kept | masked[:, :, None]
    gains = np.where(equal, (size + 1) ** 2 + (size + 1) * kept, 1)  # a preference outweighs all of those after it
    best = np.zeros((size + 1, count, size + 1), np.int64)  # of the first tokens of a draft and of a text
    for i in range(size):
        paired = best[i, :, :-1] + gains[:, i]
        best[i + 1, :, 1:] = np.maximum.accumulate(np.maximum(best[i, :, 1:], paired), axis=1)
    anchors = np.full((count, size), -1, np.int64)
    block, i, j = np.arange(count), np.full(count, size), np.full(count, size)
    while len(block):  # back from the ends, all blocks at once
        here, diagonal = best[i, block, j], best[i - 1, block, j - 1]
        gain, same = gains[block, i - 1, j - 1], equal[block, i - 1, j - 1]
        drops, skips = here == best[i - 1, block, j], here == best[i, block, j - 1]
        pairs = (here == diagonal + gain) & ~(masked[block, i - 1] & (drops | skips))
        found = pairs & same
        anchors[block[found], i[found] - 1] = j[found] - 1
        drops &= ~pairs
        i, j = i - (pairs | drops), j - (~drops)
        left = (i > 0) & (j > 0)
        block, i, j = block[left], i[left], j[left]
    return anchors
