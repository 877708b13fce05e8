"""The text of single tokens, such that the pieces of a sequence joined are its text."""

from __future__ import annotations

from collections.abc import Sequence

from llada_megatron.llada_moe.data.tokenizer import Tokenizer

_CONTEXT = 4
"""Tokens before a piece that are decoded with it: some tokenizers write a space only between two tokens."""
_UNFINISHED = "\ufffd"


def text_after(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` where they stand behind `before`."""
    context = list(before[-_CONTEXT:])
    known, whole = tokenizer.decode(context), tokenizer.decode([*context, *ids])
    return whole[len(known) :] if whole.startswith(known) else tokenizer.decode(list(ids))


def token_pieces(tokenizer: Tokenizer, ids: Sequence[int | None]) -> list[str | None]:
    """The piece of each token; None where there is none yet.

    A character of several tokens is the piece of its last one, if all of them are there.
    """
    pieces: list[str | None] = []
    start = 0
    """Tokens from here on have not said their text."""
    for i, token in enumerate(ids):
        if token is None:
            pieces.append(None)
            start = i + 1
            continue
        before = [known for known in ids[max(0, start - _CONTEXT) : start] if known is not None]
        text = text_after(tokenizer, before, [known for known in ids[start : i + 1] if known is not None])
        last = i + 1 == len(ids) or ids[i + 1] is None
        if text.endswith(_UNFINISHED) and not last and i + 1 - start < _CONTEXT:
            pieces.append("")
            continue
        pieces.append(text)
        start = i + 1
    return pieces
