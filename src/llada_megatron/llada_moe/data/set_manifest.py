"""PREFIX.json: what a prepared set holds, and the check that its files are whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.data.tokenizer import Tokenizer
from llada_megatron.llada_moe.data.tokenizer_files import load_tokenizer
from llada_megatron.llada_moe.errors import DataError

SCHEMA = 2
EARLIER_SCHEMA = 1
"""Of sets whose held-out documents may repeat others, and whose tokenizer may have been trained on them."""


REPEATS = ".repeats"
"""Ending of the list of documents that are never held out (int64, ascending)."""

ANSWERS = ".answers"
"""Ending of the list of answers in a set of conversations (see `answers`)."""


@dataclass(frozen=True, kw_only=True)
class TokenizerFacts:
    """The tokenizer that a set was prepared with."""

    file: str
    """File name beside the manifest."""
    sha256: str
    vocab_size: int
    mask_id: int
    eos_id: int

    @property
    def suffix(self) -> str:
        """`.model` (SentencePiece) or `.json` (Hugging Face)."""
        return Path(self.file).suffix


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """One input of `llada prepare`."""

    input: str
    files: int
    documents: int
    bytes: int
    """UTF-8 bytes of text."""


@dataclass(frozen=True, kw_only=True)
class NearDuplicateFacts:
    """What the comparison of the documents of a set has found (see `near_duplicates`)."""

    documents: int
    """Near-duplicates of earlier documents."""
    bytes: int
    """UTF-8 bytes of their text."""
    dropped: bool
    """They are not in the set; otherwise they are counted in it."""
    never_held_out: int
    """Documents of the set that share too much with others of it: listed in PREFIX.repeats, trained on in any split."""


@dataclass(frozen=True, kw_only=True)
class ChatFacts:
    """What a set of conversations holds beside tokens: every document is a conversation."""

    answers: int
    """Turns of the assistant, each a span of PREFIX.answers."""
    answer_tokens: int
    """Their tokens; those that end a turn included, end-of-text tokens not."""
    longest: int
    """Tokens of the longest conversation, its end-of-text token included."""
    template: str
    """The chat template."""


@dataclass(frozen=True, kw_only=True)
class SetManifest:
    """Facts of a prepared set."""

    schema: int = SCHEMA
    tokenizer: TokenizerFacts
    documents: int
    tokens: int
    """End-of-text tokens (one per document) included."""
    bytes: int
    """UTF-8 bytes of the text of all documents."""
    dtype: str
    """numpy name of a token's type in the .bin file."""
    sources: list[SourceFacts]
    near_duplicates: NearDuplicateFacts | None = None
    """None if they were not looked for."""
    vocabulary_held_out: float | None = None
    """The share of documents that is held out from the training of the vocabulary; None if it was trained elsewhere."""
    digests: dict[str, list[str]] | None = None
    """By ending, SHA-256 of the pieces of each file but the tokenizer (see `digests`); None in sets of old."""
    chat: ChatFacts | None = None
    """Of a set of conversations; None for plain text."""

    @property
    def sha256(self) -> str | None:
        """One digest of all that training reads; None if the set has no digests."""
        if self.digests is None:
            return None
        facts = [self.digests, self.tokenizer.sha256, self.tokenizer.mask_id, self.tokenizer.eos_id, self.dtype]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text that a token stands for on average."""
        return self.bytes / self.tokens


def prefix_file(prefix: str | Path, ending: str) -> Path:
    """PREFIX with an ending such as `.bin`; a dot in PREFIX is part of the name."""
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + ending)


def to_json(manifest: SetManifest) -> dict[str, Any]:
    """The manifest as JSON holds it."""
    return asdict(manifest)


def read_manifest(prefix: str | Path) -> SetManifest:
    """Read PREFIX.json and check the files beside it. Raises DataError for a missing, damaged or truncated set."""
    path = prefix_file(prefix, ".json")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such prepared set; `llada prepare INPUT --output {prefix}` writes one") from error
    except ValueError as error:
        raise DataError(f"{path}: damaged manifest ({error}); prepare the set again") from error
    manifest = _parse(path, content)
    _check_files(prefix, manifest)
    return manifest


def tokenizer_of(prefix: str | Path, manifest: SetManifest | None = None) -> Tokenizer:
    """The tokenizer beside a prepared set, checked against its manifest. Raises DataError if it is another one."""
    facts = (manifest or read_manifest(prefix)).tokenizer
    tokenizer = load_tokenizer(Path(prefix).parent / facts.file)
    if tokenizer.sha256 != facts.sha256:
        raise DataError(f"{tokenizer.path}: not the tokenizer that {prefix_file(prefix, '.json')} was prepared with")
    tokenizer.eos_id, tokenizer.mask_id, tokenizer.vocab_size = facts.eos_id, facts.mask_id, facts.vocab_size
    return tokenizer


def read_repeats(prefix: str | Path, manifest: SetManifest) -> NDArray[np.int64]:
    """Numbers of the documents that are never held out, ascending. Raises DataError for a file of another set."""
    count = manifest.near_duplicates.never_held_out if manifest.near_duplicates else 0
    if not count:
        return np.empty(0, np.int64)
    path = prefix_file(prefix, REPEATS)
    if not path.is_file() or path.stat().st_size != 8 * count:
        raise DataError(f"{path}: missing or not of this manifest ({count} documents); prepare the set again")
    return np.memmap(path, "<i8", mode="r")


def _parse(path: Path, content: Any) -> SetManifest:
    """Build the manifest from JSON, keys checked."""
    if not isinstance(content, dict) or content.get("schema") not in (EARLIER_SCHEMA, SCHEMA):
        found = content.get("schema") if isinstance(content, dict) else None
        raise DataError(f"{path}: manifest schema {found}, this version reads {SCHEMA}; prepare the set again")
    try:
        return SetManifest(
            **{name: content[name] for name in ("schema", "documents", "tokens", "bytes", "dtype")},
            tokenizer=TokenizerFacts(**content["tokenizer"]),
            sources=[SourceFacts(**source) for source in content["sources"]],
            near_duplicates=NearDuplicateFacts(**near) if (near := content.get("near_duplicates")) else None,
            vocabulary_held_out=content.get("vocabulary_held_out"),
            digests=content.get("digests"),
            chat=ChatFacts(**chat) if (chat := content.get("chat")) else None,
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged manifest ({error}); prepare the set again") from error


def _check_files(prefix: str | Path, manifest: SetManifest) -> None:
    """The token files stand, and the .bin holds exactly the tokens of the manifest."""
    for ending in (".bin", ".idx", ".bytes"):
        if not prefix_file(prefix, ending).is_file():
            raise DataError(f"{prefix_file(prefix, ending)}: missing; prepare the set again")
    binary = prefix_file(prefix, ".bin")
    size, expected = binary.stat().st_size, manifest.tokens * {"uint16": 2, "int32": 4}[manifest.dtype]
    if size != expected:
        raise DataError(
            f"{binary}: {size} bytes, but {manifest.tokens} tokens take {expected}: truncated or not of this manifest"
        )
