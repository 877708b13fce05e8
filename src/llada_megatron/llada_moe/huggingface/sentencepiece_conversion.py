"""A SentencePiece byte-pair model as a `tokenizer.json`: the same pieces, ids and merges.

A SentencePiece model merges the neighbours whose union has the best score, the leftmost first. A byte-pair model of the
`tokenizers` package merges the neighbours whose pair comes first in a list. That list consists of all ways to split
each piece in two, ordered by the score of the piece. (Two ways to split one piece have the same score but two positions
in the list. That could matter where occurrences of a piece overlap; no such text is known.) Spaces stay spaces in the
pieces, so that the character which SentencePiece writes for them is ordinary text, as for SentencePieceTokenizer.

The fields of the file are those of `sentencepiece_model.proto`. They are read here because the generated reader of the
sentencepiece package works with one version of protobuf only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

import tokenizers
from tokenizers import decoders, models, normalizers

from llada_megatron.llada_moe.data.sentencepiece_tokenizer import SPACE_SYMBOL
from llada_megatron.llada_moe.errors import DataError

_BYTE_PAIRS = 2
"""`trainer_spec.model_type` of byte-pair models."""
_LONGEST_VARINT = 10
"""Bytes of an integer of 64 bits, the longest in protobuf's encoding."""


class Kind(IntEnum):
    """The kind of a piece, as SentencePiece numbers them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class VocabularyPiece:
    """One piece of the vocabulary; its id is its position in the list."""

    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class VocabularyModel:
    """The content of a SentencePiece file, as far as it matters here."""

    pieces: list[VocabularyPiece]
    dummy_prefix: bool
    """Whether a space is put before every text."""
    unlike: list[str]
    """Reasons why a `tokenizer.json` would not give the same ids; empty if it would."""


def read_model(data: bytes) -> VocabularyModel:
    """The pieces and rules in the bytes of a `.model` file. Raises DataError: it is no SentencePiece model."""
    try:
        top = list(_fields(data))
        pieces = [_piece(dict(_fields(value))) for number, value in top if number == 1]
        trainer, rules = (dict(_fields(next((v for n, v in top if n == number), b""))) for number in (2, 3))
    except (IndexError, ValueError, struct.error, TypeError) as error:
        raise DataError(f"not a SentencePiece model ({error!r})") from error
    kinds = {piece.kind for piece in pieces}
    reasons = {
        "it is no byte-pair model": trainer.get(3, 1) != _BYTE_PAIRS,
        "it has no pieces for bytes": not trainer.get(35, 0),
        "it puts spaces behind words": bool(trainer.get(24, 0)),
        "it normalizes characters": bool(rules.get(2, b"")),
        "it removes spaces": bool(rules.get(4, 1)),
        "it does not mark spaces": not rules.get(5, 1),
        "it puts spaces before its own symbols": bool(rules.get(3, 1)) and Kind.USER_DEFINED in kinds,
        "it has pieces that are not used": Kind.UNUSED in kinds,
    }
    return VocabularyModel(pieces, bool(rules.get(3, 1)), [reason for reason, holds in reasons.items() if holds])


def convert(model: VocabularyModel) -> tokenizers.Tokenizer:
    """A tokenizer with the same vocabulary, ids and merges; control symbols are special tokens, which no text produces.

    `model.unlike` must be empty. With a dummy prefix, a text that holds the character for spaces has fewer
    spaces here: SentencePieceTokenizer encodes what follows it as a text of its own.
    """
    texts = [piece.text.replace(SPACE_SYMBOL, " ") for piece in model.pieces]
    vocabulary = {text: index for index, text in enumerate(texts)}
    if len(vocabulary) < len(texts):
        raise DataError("two pieces of the SentencePiece model are the same text")
    converted = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=list(_merges(model)), byte_fallback=True))
    if model.dummy_prefix:
        converted.normalizer = normalizers.Prepend(" ")
    converted.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    for text, piece in zip(texts, model.pieces, strict=True):
        if piece.kind in (Kind.CONTROL, Kind.USER_DEFINED):
            special = piece.kind is Kind.CONTROL
            converted.add_tokens([tokenizers.AddedToken(text, special=special, normalized=False)])
    return converted


def _merges(model: VocabularyModel) -> Iterator[tuple[str, str]]:
    """Pairs of pieces to merge, the best first."""
    normal = {piece.text.replace(SPACE_SYMBOL, " "): piece.score for piece in model.pieces if piece.kind is Kind.NORMAL}
    for text in sorted(normal, key=lambda text: -normal[text]):
        for cut in range(1, len(text)):
            if text[:cut] in normal and text[cut:] in normal:
                yield text[:cut], text[cut:]


def _piece(fields: dict[int, int | bytes]) -> VocabularyPiece:
    text, score = fields.get(1, b""), fields.get(2, b"\0\0\0\0")
    if not isinstance(text, bytes) or not isinstance(score, bytes):
        raise TypeError("a piece whose text or score is an integer")
    return VocabularyPiece(text.decode(), struct.unpack("<f", score)[0], Kind(fields.get(3, Kind.NORMAL)))


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message in protobuf's encoding; fixed-width values as their bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        else:
            length = {1: 8, 5: 4}[wire] if wire in (1, 5) else -1
        if length < 0 or at + length > len(data):
            raise ValueError(f"field {number} does not end")
        yield number, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer in protobuf's encoding, and the offset after it."""
    value = 0
    for place in range(_LONGEST_VARINT):
        byte = data[at + place]
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise ValueError(f"the integer at byte {at} does not end")
