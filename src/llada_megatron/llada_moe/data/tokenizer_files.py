"""Which tokenizer a file holds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.data.huggingface_tokenizer import HuggingFaceTokenizer
from llada_megatron.llada_moe.data.sentencepiece_tokenizer import SentencePieceTokenizer
from llada_megatron.llada_moe.data.tokenizer import Tokenizer
from llada_megatron.llada_moe.errors import DataError


def load_tokenizer(path: str | Path, eos_token: str | None = None, mask_token: str | None = None) -> Tokenizer:
    """Load a SentencePiece `.model`, a Hugging Face `tokenizer.json`, or a folder that holds one of them.

    `eos_token` and `mask_token` name the tokens where the file's own choice should not be used. Raises DataError.
    """
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
