"""Which tokens of a sequence belong to one word, asked of the tokenizer by what its tokens read as."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llada_megatron.llada_moe.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llada_megatron.llada_moe.data.tokenizer import Tokenizer

_IDEOGRAPHS = 0x2E80
"""From here on Unicode has the scripts that are written without spaces, of which each token counts as a word."""
_UNFINISHED = "�"
"""What a tokenizer writes for a part of a character."""


class WordStarts:
    """Tells where words begin: at a space, at what is no letter or digit, and at a special token.

    A token is looked up when it first occurs.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises DataError: no token of the tokenizer is a piece of a word, behind which others could be read."""
        self._tokenizer = tokenizer
        known = (id for id in range(tokenizer.vocab_size) if tokenizer.decode([id])[-1:].isalpha())
        self._anchor = next(known, -1)
        if self._anchor < 0:
            raise DataError(f"{tokenizer.path}: no token reads as letters, so that there are no words")
        self._before = tokenizer.decode([self._anchor])
        self._begins = np.zeros(tokenizer.vocab_size, bool)
        self._known = np.zeros(tokenizer.vocab_size, bool)

    def words(self, tokens: NDArray[np.int64], boundaries: NDArray[np.int32]) -> NDArray[np.int64]:
        """`[seq]`, for each token the position at which its word begins; none reaches over a boundary of segments."""
        for id in np.unique(tokens[~self._known[tokens]]).tolist():
            self._begins[id], self._known[id] = self._begins_word(id), True
        begins = self._begins[tokens]
        begins[boundaries[:-1]] = True
        return np.maximum.accumulate(np.where(begins, np.arange(len(tokens)), 0))

    def _begins_word(self, id: int) -> bool:
        text = self._tokenizer.decode([self._anchor, id])
        added = text[len(self._before) :] if text.startswith(self._before) else ""
        if added.startswith(_UNFINISHED):
            return False
        return not added[:1].isalnum() or ord(added[0]) >= _IDEOGRAPHS
