"""A tokenizer that works in the process with limits: its file may hold an expression that explodes, or a huge text.

The functions below `GuardedTokenizer` are those that run in that process.
"""

from __future__ import annotations

import array
import base64
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.data.tokenizer import Tokenizer
from llada_megatron.llada_moe.errors import DataError
from llada_megatron.llada_moe.guard import process

_REMEMBERED, _SHORT = 2**16, 16
"""How many texts of how many ids at most are remembered: displays ask for them again in every step."""


class GuardedTokenizer(Tokenizer):
    """A `tokenizer.json`, in the process with limits."""

    def __init__(self, path: Path, eos_token: str | None, mask_token: str | None) -> None:
        """Load it there. Raises DataError: it is no tokenizer, or its code goes beyond the limits."""
        self.path, self.sha256 = path, ""
        self._file = (os.path.abspath(path), eos_token, mask_token)
        facts: Mapping[str, Any] = self._call("describe")
        self.sha256: str = facts["sha256"]
        self.vocab_size: int = facts["vocab_size"]
        self.eos_id: int = facts["eos_id"]
        self.mask_id: int = facts["mask_id"]
        self.mask_was_added: bool = facts["mask_was_added"]
        self.unused_ids: Sequence[int] = facts["unused_ids"]
        self.special_ids: Mapping[str, int] = facts["special_ids"]
        self._decode_short = functools.lru_cache(_REMEMBERED)(self._decode)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the tokens that the file's template would add around it."""
        return _unpacked(self._call("encode", text))

    def encode_with_names(self, text: str) -> list[int]:
        """Ids of a text in which the names of special tokens stand for these tokens."""
        return _unpacked(self._call("encode_with_names", text))

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special tokens and an added mask are left out."""
        kept = tuple(int(i) for i in ids if i not in (self.mask_id, self.eos_id))
        return (self._decode_short if len(kept) <= _SHORT else self._decode)(kept)

    def _decode(self, ids: tuple[int, ...]) -> str:
        return self._call("decode", ids) if ids else ""

    def _call(self, function: str, *arguments: Any) -> Any:
        path, eos_token, mask_token = self._file
        function = f"{__name__}:{function}"
        try:
            return process.call(str(self.path), function, path, self.sha256, eos_token, mask_token, *arguments)
        except DataError as error:  # there the path is absolute, since the process has a current directory of its own
            raise DataError(str(error).replace(path, str(self.path))) from error


def _packed(ids: list[int]) -> str:
    """Ids as one word: as JSON numbers they would take as long as encoding a text does."""
    return base64.b64encode(array.array("i", ids).tobytes()).decode("ascii")


def _unpacked(text: str) -> list[int]:
    return array.array("i", base64.b64decode(text)).tolist()


@functools.lru_cache(8)
def _loaded(path: str, sha256: str, eos_token: str | None, mask_token: str | None) -> Any:
    """The tokenizer in a file; with a SHA-256, only if the file still has it."""
    from llada_megatron.llada_moe.data.tokenizer_files import load_directly

    tokenizer = load_directly(path, eos_token, mask_token)
    if sha256 not in ("", tokenizer.sha256):
        raise DataError(f"{path}: the tokenizer was changed while it was in use")
    return tokenizer


def describe(path: str, sha256: str, eos_token: str | None, mask_token: str | None) -> dict[str, Any]:
    """What `Tokenizer` says of itself; that it encodes and decodes is tried as well."""
    _loaded.cache_clear()  # the file may be another one by now
    tokenizer = _loaded(path, sha256, eos_token, mask_token)
    tokenizer.decode(tokenizer.encode("The quick brown fox: 3 + 4 = 7\n\t日本語\n"))
    names = ("sha256", "vocab_size", "eos_id", "mask_id", "mask_was_added", "unused_ids", "special_ids")
    return {name: getattr(tokenizer, name) for name in names}


def encode(path: str, sha256: str, eos_token: str | None, mask_token: str | None, text: str) -> str:
    """Ids of a text, packed."""
    return _packed(_loaded(path, sha256, eos_token, mask_token).encode(text))


def encode_with_names(path: str, sha256: str, eos_token: str | None, mask_token: str | None, text: str) -> str:
    """Ids of a text in which the names of special tokens stand for these tokens, packed."""
    return _packed(_loaded(path, sha256, eos_token, mask_token).encode_with_names(text))


def decode(path: str, sha256: str, eos_token: str | None, mask_token: str | None, ids: list[int]) -> str:
    """The text of ids, none of which is the end-of-text or mask token."""
    return _loaded(path, sha256, eos_token, mask_token).decode(ids)
