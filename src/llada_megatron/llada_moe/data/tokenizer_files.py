"""Which tokenizer a file holds, and Hugging Face's `tokenizer.json`, read with the `tokenizers` package alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.llada_moe.data.guarded_tokenizer import GuardedTokenizer
from llada_megatron.llada_moe.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada_megatron.llada_moe.data.tokenizer import EOS_NAMES, MASK_NAMES, Tokenizer, choose_name, eos_missing
from llada_megatron.llada_moe.errors import DataError

if TYPE_CHECKING:
    import tokenizers


LARGEST_VOCABULARY = 2**22
"""Sixteen times the largest published vocabulary: memory and the model's output layer grow with the largest id."""


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`. Special tokens inside running text are ordinary text."""

    def __init__(self, path: Path, data: bytes, sha256: str, eos_token: str | None, mask_token: str | None) -> None:
        """Load from the bytes of the file; a `tokenizer_config.json` beside it may name the special tokens.

        Raises DataError when the bytes are no tokenizer or when no end-of-text token can be told.
        """
        self.path, self.sha256 = path, sha256
        named = _names_beside(path)
        eos_token, mask_token = eos_token or named.get("eos_token"), mask_token or named.get("mask_token")
        self._tokenizer = _load(path, data, {eos_token, mask_token, *EOS_NAMES, *MASK_NAMES})
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        size = max(vocabulary.values(), default=-1) + 1
        if size > LARGEST_VOCABULARY:
            name = max(vocabulary, key=vocabulary.__getitem__)
            raise DataError(
                f"{path}: the token {name[:40]!r} has the id {size - 1:,}, but ids end at {LARGEST_VOCABULARY - 1:,}"
            )
        eos = choose_name(eos_token, EOS_NAMES, set(vocabulary), "end-of-text", path)
        if eos is None:
            raise eos_missing(path)
        self.eos_id = vocabulary[eos]
        mask = choose_name(mask_token, MASK_NAMES, set(vocabulary), "mask", path)
        if mask is not None and vocabulary[mask] in self.encode(f"a {mask} b{mask}"):
            mask = None  # text can produce this token: it cannot stand for "unknown"
        self.mask_was_added = mask is None
        self.mask_id = size if mask is None else vocabulary[mask]
        self.vocab_size = size + self.mask_was_added
        self.unused_ids = sorted(set(range(self.vocab_size)) - set(vocabulary.values()))
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = {token.content: id for id, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without the tokens that the file's template would add around it."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of Rust is no Exception; it must not look like a defect of ours
            raise DataError(f"{self.path}: the tokenizer fails on a text ({type(error).__name__}: {error})") from error

    def encode_with_names(self, text: str) -> list[int]:
        """Ids of a text in which the names of special tokens stand for these tokens."""
        self._tokenizer.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self._tokenizer.encode_special_tokens = True

    def decode(self, ids: list[int]) -> str:
        """The text of ids; special tokens and an added mask are left out."""
        drop = (self.mask_id, self.eos_id)
        return self._tokenizer.decode([int(i) for i in ids if i not in drop], skip_special_tokens=True)


def _load(path: Path, data: bytes, special: set[str | None]) -> tokenizers.Tokenizer:
    """Parse the file; added tokens with a special name are marked special, so that text cannot produce them."""
    import tokenizers

    try:
        content = json.loads(data)
        for token in content.get("added_tokens") or []:
            token["special"] = token.get("special") or token["content"] in special
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the package raises bare Exception for a file it cannot read
        raise DataError(f"{path}: not a Hugging Face tokenizer ({error})") from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _names_beside(path: Path) -> dict[str, str]:
    """The special tokens' names in `tokenizer_config.json` beside the tokenizer, if there is one."""
    file = path.with_name("tokenizer_config.json")
    if not file.is_file():
        return {}
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: not a JSON object")
    names = {}
    for key in ("eos_token", "mask_token"):
        value = content.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[key] = value
    return names


def load_tokenizer(path: str | Path, eos_token: str | None = None, mask_token: str | None = None) -> Tokenizer:
    """Load a SentencePiece `.model`, a Hugging Face `tokenizer.json`, or a folder that holds one of them.

    What the file makes a library do happens in the process with limits: all of it for a `tokenizer.json`, the first
    loading for a SentencePiece model, which holds no code. `eos_token` and `mask_token` name the tokens where the
    file's own choice should not be used. Raises DataError.
    """
    file = _tokenizer_file(Path(path))
    guarded = GuardedTokenizer(file, eos_token, mask_token)
    if file.suffix == ".json":
        return guarded
    return load_directly(file, eos_token, mask_token)


def load_directly(path: str | Path, eos_token: str | None = None, mask_token: str | None = None) -> Tokenizer:
    """`load_tokenizer` for a process that has limits of its own. Raises DataError."""
    file = _tokenizer_file(Path(path))
    data = file.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    if file.suffix == ".json":
        return HuggingFaceTokenizer(file, data, sha256, eos_token, mask_token)
    return SentencePieceTokenizer(file, data, sha256, eos_token, mask_token)


def require_tokenizer(path: str | Path, facts: Mapping[str, Any] | None, checkpoint: Path) -> None:
    """Check that a file or folder is the tokenizer that a checkpoint was trained with.

    Args:
        facts: what the checkpoint says of its tokenizer; None where it knows of none, and any will do.

    Raises:
        DataError: it is no tokenizer file, or another one.
    """
    if facts and hashlib.sha256(_tokenizer_file(Path(path)).read_bytes()).hexdigest() != facts.get("sha256"):
        raise DataError(f"{path} is not the tokenizer that {checkpoint} was trained with; give that with --tokenizer")


def _tokenizer_file(path: Path) -> Path:
    """The tokenizer file that a path means."""
    if path.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (path / name).is_file():
                return path / name
        raise DataError(f"{path}: neither tokenizer.json nor tokenizer.model in this folder")
    if not path.is_file():
        raise DataError(f"{path}: no such tokenizer file")
    if path.suffix not in (".model", ".json"):
        raise DataError(f"{path}: a tokenizer is a SentencePiece .model or a Hugging Face tokenizer.json")
    return path
