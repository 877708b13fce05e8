"""Documents to token ids in several processes, the results in the order of the corpus whatever their number."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.data.chunk_pool import map_chunks
from llada_megatron.llada_moe.data.corpus import Chunk, Dropped, documents
from llada_megatron.llada_moe.data.formats import Reading
from llada_megatron.llada_moe.data.tokenizer import Tokenizer, encode_long
from llada_megatron.llada_moe.data.tokenizer_files import load_directly, load_tokenizer
from llada_megatron.llada_moe.errors import DataError
from llada_megatron.llada_moe.guard.limits import allow_cpu, limit_memory
from llada_megatron.llada_moe.guard.process import LIMITS

_CHUNK_CPU_S, _SLOWEST = 300, 10_000
"""Processor time for one chunk, and bytes of it in a second more: far slower than any honest tokenizer."""


@dataclass(frozen=True)
class TokenizerChoice:
    """What a worker needs to load the tokenizer for itself."""

    path: str
    eos_token: str | None = None
    mask_token: str | None = None

    def load(self) -> Tokenizer:
        """Load it; it works in the process with limits."""
        return load_tokenizer(self.path, self.eos_token, self.mask_token)

    def load_directly(self) -> Tokenizer:
        """Load it in a process that has limits of its own."""
        return load_directly(self.path, self.eos_token, self.mask_token)


@dataclass
class Encoded:
    """The documents of one chunk as tokens."""

    tokens: NDArray[np.int32]
    """All documents one after the other, each with its end-of-text token if it ends in the chunk."""
    lengths: list[int]
    """Tokens of each document, or of its part in the chunk."""
    sizes: list[int]
    """UTF-8 bytes of each document's text, or of its part in the chunk."""
    empty: int
    """Documents without a character, left out."""
    dropped: Dropped = field(default_factory=Dropped)

    def without(self, dropped: NDArray[np.int64]) -> Encoded:
        """The same without the documents of these numbers in it."""
        kept = np.ones(len(self.lengths), bool)
        kept[dropped] = False
        lengths, sizes = np.array(self.lengths, np.int64), np.array(self.sizes, np.int64)
        tokens = self.tokens[np.repeat(kept, lengths)]
        return Encoded(tokens, lengths[kept].tolist(), sizes[kept].tolist(), self.empty, self.dropped)


def encode_corpus(
    work: Iterable[Chunk], choice: TokenizerChoice, reading: Reading, workers: int
) -> Iterator[tuple[Chunk, Encoded]]:
    """Each chunk with its tokens, in order. Raises what a worker raises; ResourceError when one dies."""
    if workers <= 1:
        tokenizer = choice.load()
        for chunk in work:
            yield chunk, encode_chunk(chunk, tokenizer, reading)
        return
    yield from map_chunks(work, _encode_in_worker, workers, _start_worker, (choice, reading))


def encode_chunk(chunk: Chunk, tokenizer: Tokenizer, reading: Reading) -> Encoded:
    """Read and encode the documents of one chunk. A document that goes on in the next chunk gets its end there."""
    dropped = Dropped()
    parts: list[NDArray[np.int32]] = []
    sizes: list[int] = []
    empty = 0
    for text in documents(chunk, reading, dropped):
        if not text:
            empty += 1
            continue
        ids = encode_long(tokenizer, text, continues=not chunk.begins)
        if tokenizer.mask_id in ids:
            raise DataError(
                f"{tokenizer.path}: the tokenizer turns text of {chunk.sources[0].name} into its mask token"
            )
        parts.append(np.array([*ids, tokenizer.eos_id] if chunk.ends else ids, np.int32))
        sizes.append(len(text.encode("utf-8")))
    tokens = np.concatenate(parts) if parts else np.empty(0, np.int32)
    return Encoded(tokens, [len(part) for part in parts], sizes, empty, dropped)


_worker: tuple[Tokenizer, Reading] | None = None
"""Set once in each worker process."""


def _start_worker(choice: TokenizerChoice, reading: Reading) -> None:
    """Load the tokenizer in a worker; Ctrl-C is the parent's to handle."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a tokenizer's panic: its error is raised in the parent
    limit_memory(LIMITS.memory_bytes)
    _worker = choice.load_directly(), reading


def _encode_in_worker(chunk: Chunk) -> Encoded:
    """`encode_chunk` with the worker's tokenizer."""
    assert _worker is not None
    allow_cpu(_CHUNK_CPU_S + chunk.size / _SLOWEST)
    return encode_chunk(chunk, *_worker)
