"""Kinds of tokens, told by their text."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.data.tokenizer import Tokenizer

MASKED, VISIBLE = "masked", "visible"
CLASSES = ("letters", "digits", "punctuation", "white space", "mixed", "part of a character", "special")


def class_of(piece: str) -> str:
    """The kind of a token with this text; "" is that of a special token."""
    if piece == "":
        return "special"
    if "\ufffd" in piece:
        return "part of a character"
    text = piece.strip()
    if not text:
        return "white space"
    if text.isalpha():
        return "letters"
    if text.isdecimal():
        return "digits"
    return "mixed" if any(character.isalnum() for character in text) else "punctuation"


def pieces_of(tokens: NDArray[np.int64], tokenizer: Tokenizer, model: ModelConfig) -> dict[int, str]:
    """The text of each token that occurs, "" for special ones.

    It is decoded behind a letter, so that a leading space is kept.
    """
    before = tokenizer.encode("a")[-1:]
    known = len(tokenizer.decode(before))
    special = model.special_ids | set(tokenizer.special_ids.values())
    return {
        token: "" if token in special or token >= tokenizer.vocab_size else tokenizer.decode([*before, token])[known:]
        for token in np.unique(tokens).tolist()
    }


def labels(
    tokens: NDArray[np.int64], masked: NDArray[np.bool_], pieces: dict[int, str] | None
) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the classes, and the class of each row `[rows]`; all masks are one, whatever they hide."""
    if pieces is None:
        return [MASKED, VISIBLE], np.where(masked, 0, 1)
    names = [MASKED, *CLASSES]
    ids = np.array(sorted(pieces))
    numbers = np.array([names.index(class_of(pieces[token])) for token in ids.tolist()])
    return names, np.where(masked, 0, numbers[np.searchsorted(ids, tokens)])
