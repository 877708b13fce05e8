"""Text to token ids and back, for SentencePiece models and Hugging Face `tokenizer.json` files.

Two things hold for every tokenizer that `tokenizer_files` loads. It has a mask token: where the file brings none, the
id after the last one becomes the mask. And no text can produce that id: a text that contains the mask's name is encoded
as ordinary text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from llada_megatron.llada_moe.errors import DataError

MASK_NAMES = ("<mask>", "<|mask|>", "<|mdm_mask|>", "<[MASK]>", "[MASK]", "<MASK>")
"""Names that a mask token goes by (`<|mdm_mask|>` LLaDA-8B, `<|mask|>` LLaDA-MoE and LLaDA2, `[MASK]` BERT)."""
EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "[EOS]", "[SEP]")
"""Names that an end-of-text token goes by, the document's end before the turn's end."""
LONG_TEXT = 1 << 20
"""Characters above which a text is encoded in parts cut at line ends, so that memory stays bounded."""


class Tokenizer(Protocol):
    """What the rest of the package needs from a tokenizer. Ids are 0 <= id < vocab_size."""

    vocab_size: int
    """All ids, the mask's included."""
    eos_id: int
    mask_id: int
    mask_was_added: bool
    """The file has no mask token that text cannot produce; `mask_id` is the id after its last one."""
    sha256: str
    """SHA-256 of the tokenizer file, in hexadecimal."""
    path: Path
    unused_ids: Sequence[int]
    """Ids below vocab_size that stand for nothing; of an added mask token its own."""
    special_ids: Mapping[str, int]
    """Tokens by their name that no text can produce."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin, end or mask tokens."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids; begin, end and mask tokens are left out."""
        ...


def encode_long(tokenizer: Tokenizer, text: str, limit: int = LONG_TEXT, continues: bool = False) -> list[int]:
    """Ids of a text of any length; one above `limit` characters is encoded in parts that end at line ends.

    `continues`: the text stands behind another, so that nothing belongs between the two.
    """
    ids: list[int] = []
    start = 0
    while start < len(text):
        rest = len(text) - start <= limit
        cut = len(text) if rest else text.rfind("\n", start, start + limit) + 1 or start + limit
        part = text[start:cut]
        ids += encode_behind(tokenizer.encode, part) if continues or start else tokenizer.encode(part)
        start = cut
    return ids


_BEFORE = ("\n", ".", "a", "0", "中")
"""Characters that a text is put behind, of which one at least does not grow together with the text's first."""


def encode_behind(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Ids of a text that stands behind another one.

    Many tokenizers put a space before each text that they are given, and take it away where the ids begin; in the
    middle of a document it would stay. Of such a tokenizer the text is encoded behind a character whose ids are known.
    """
    alone = encode("a")
    if encode("\na")[-len(alone) :] == alone:
        return encode(text)
    for before in _BEFORE:
        known, ids = encode(before), encode(before + text)
        if known and ids[: len(known)] == known:
            return ids[len(known) :]
    return encode(text)


def choose_name(wanted: str | None, known: tuple[str, ...], has: set[str], what: str, file: Path) -> str | None:
    """The name of a special token: the wanted one (DataError if missing), else the first known one in the file."""
    if wanted is not None:
        if wanted not in has:
            raise DataError(f"{file}: no {what} token {wanted!r} in this tokenizer")
        return wanted
    return next((name for name in known if name in has), None)


def eos_missing(file: Path) -> DataError:
    """The error of a tokenizer whose end-of-text token cannot be told."""
    return DataError(
        f"{file}: no end-of-text token found (looked for {', '.join(EOS_NAMES)}); name it with --eos-token"
    )
