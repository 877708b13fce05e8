"""The text of a profile: windows of prepared sets, or of files that are tokenised on the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.data.tokenizer import Tokenizer
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.llada_moe.evaluation.text_windows import TextWindow, cut_windows


@dataclass(frozen=True)
class ProfileText:
    """What is profiled."""

    windows: list[TextWindow]
    sources: list[str]

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return sum(len(window.tokens) for window in self.windows)


def read_texts(
    inputs: list[str],
    tokenizer: Tokenizer | None,
    model: ModelConfig,
    tokens: int,
    length: int,
    digest: str | None = None,
) -> ProfileText:
    """Windows of `length` with `tokens` tokens in all, equally many of each source.

    Args:
        inputs: prefixes of prepared sets, text files, JSON lines or folders. What `llada prepare` took as several
            inputs is several sources.
        tokenizer: of the checkpoint; None = it has none, and only prepared sets can be read.
        digest: SHA-256 of the tokenizer that the checkpoint was trained with; None = it is not known.

    Raises:
        DataError: an input cannot be read, is of another tokenizer, or has fewer tokens than asked.
    """
    found: dict[str, Iterator[NDArray[np.int64]]] = {}
    for name in inputs:
        found |= _prepared(name, model, digest) if _is_prepared(name) else _files(name, tokenizer)
    wanted = tokens // length // len(found)
    if wanted < 1:
        raise ConfigError(
            f"--tokens {tokens}: less than one window of {length} for each of {len(found)} sources; "
            f"at least {length * len(found)}"
        )
    windows, there = [], {}
    for number, (source, documents) in enumerate(found.items()):
        cut = list(cut_windows(documents, length, wanted, number))
        there[source] = len(cut)
        windows += cut
    short = {source: count for source, count in there.items() if count < wanted}
    if short:
        source, count = min(short.items(), key=lambda item: item[1])
        most = count * length * len(found)
        advice = f"ask for --tokens {most}" if most else f"a window has --length {length}: ask for a smaller one"
        raise DataError(
            f"--data {source}: {count * length} tokens in whole windows of {length}, but --tokens {tokens} takes "
            f"{wanted * length} of each source; {advice}, or give more text"
        )
    return ProfileText(windows, list(found))


def _is_prepared(name: str) -> bool:
    from llada_megatron.llada_moe.data.set_manifest import prefix_file

    return not Path(name).exists() and prefix_file(name, ".idx").exists()


def _prepared(prefix: str, model: ModelConfig, digest: str | None) -> dict[str, Iterator[NDArray[np.int64]]]:
    """The documents of a prepared set by its inputs, which lie one after the other."""
    from llada_megatron.llada_moe.data.indexed import TokenFile
    from llada_megatron.llada_moe.data.set_manifest import read_manifest

    manifest = read_manifest(prefix)
    facts = manifest.tokenizer
    if facts.mask_id != model.mask_token_id or facts.vocab_size > model.vocab_size:
        raise DataError(
            f"--data {prefix}: prepared for {facts.vocab_size} ids with mask id {facts.mask_id}, but the checkpoint "
            f"has {model.vocab_size} and mask id {model.mask_token_id}; give text, or a set of its tokenizer"
        )
    if digest not in (None, facts.sha256):
        raise DataError(
            f"--data {prefix}: prepared with another tokenizer than the checkpoint's ({facts.sha256[:12]}, not "
            f"{digest[:12]}); give text, or a set of its tokenizer"
        )
    file = TokenFile(prefix)

    def documents(first: int, last: int) -> Iterator[NDArray[np.int64]]:
        for number in np.random.default_rng(0).permutation(np.arange(first, last)):
            begin, length = file.span(int(number))
            yield file.tokens[begin : begin + length].astype(np.int64)

    counts = [source.documents for source in manifest.sources if source.documents]
    names = [source.input for source in manifest.sources if source.documents]
    if len(counts) < 2 or sum(counts) != file.documents:
        return {prefix: documents(0, file.documents)}
    ends = np.cumsum(counts).tolist()
    return {
        f"{prefix}: {name}": documents(end - count, end) for name, count, end in zip(names, counts, ends, strict=True)
    }


def _files(name: str, tokenizer: Tokenizer | None) -> dict[str, Iterator[NDArray[np.int64]]]:
    """The documents of files, in their order."""
    from llada_megatron.llada_moe.data.corpus import chunks
    from llada_megatron.llada_moe.data.encoding import encode_chunk
    from llada_megatron.llada_moe.data.formats import Reading
    from llada_megatron.llada_moe.data.sources import find_sources

    if not Path(name).exists():
        raise DataError(f"--data {name}: neither a file or folder nor the prefix of a prepared set")
    if tokenizer is None:
        raise DataError(f"--data {name}: the checkpoint has no tokenizer; say where it is with --tokenizer FILE")
    reading = Reading("text", False, 0)
    sources = find_sources([name], reading)
    if not sources:
        raise DataError(f"--data {name}: no file of text in it")

    def documents() -> Iterator[NDArray[np.int64]]:
        for chunk in chunks(sources, reading):
            encoded = encode_chunk(chunk, tokenizer, reading)
            yield from np.split(encoded.tokens.astype(np.int64), np.cumsum(encoded.lengths)[:-1])

    return {name: documents()}
