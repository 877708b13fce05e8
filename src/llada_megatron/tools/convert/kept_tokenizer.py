"""The tokenizer's files of an imported checkpoint, which are kept unchanged."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llada_megatron.console import message
from llada_megatron.llada_moe.data.tokenizer import Tokenizer
from llada_megatron.llada_moe.data.tokenizer_files import load_tokenizer
from llada_megatron.llada_moe.errors import DataError
from llada_megatron.llada_moe.huggingface.tokenizer_export import find_tokenizer_files
from llada_megatron.parallel.checkpoint.manifest import sync_directory, write_durably


@dataclass(frozen=True)
class KeptTokenizer:
    """Files by name, and what they load as; None where there are none, or none that can be used."""

    files: dict[str, bytes]
    loaded: Tokenizer | None

    @property
    def digests(self) -> dict[str, str]:
        """SHA-256 by name."""
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.files.items()}

    def facts(self, folder: Path) -> dict[str, Any] | None:
        """What a checkpoint says of it that has it in `folder`."""
        if self.loaded is None:
            return None
        path = folder / self.loaded.path.name
        return {"sha256": self.loaded.sha256, "vocab_size": self.loaded.vocab_size, "path": str(path)}

    def write(self, folder: Path) -> None:
        """Make `folder` and the files in it, durably, unless there are none."""
        if self.files:
            folder.mkdir(exist_ok=True)
            for name, data in self.files.items():
                write_durably(folder / name, data)
            sync_directory(folder)


def keep_tokenizer(directory: Path) -> KeptTokenizer:
    """Read the files of the tokenizer in a checkpoint's directory, and say so if they cannot be used."""
    files = {path.name: path.read_bytes() for path in find_tokenizer_files(directory)}
    try:
        loaded = load_tokenizer(directory) if files else None
    except DataError as error:
        message(f"the tokenizer's files are kept but cannot be used: {error}")
        loaded = None
    return KeptTokenizer(files, loaded)
