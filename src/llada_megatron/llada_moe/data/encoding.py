"""Documents to token ids in several processes, the results in the order of the corpus whatever their number."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.data.corpus import Chunk, Skipped, documents
from llada_megatron.llada_moe.data.tokenizer import Tokenizer, encode_long
from llada_megatron.llada_moe.data.tokenizer_files import load_tokenizer
from llada_megatron.llada_moe.errors import DataError, ResourceError

_AHEAD = 4
"""Chunks read ahead per worker: enough to keep it busy, few enough to bound memory."""


@dataclass(frozen=True)
class TokenizerChoice:
    """What a worker needs to load the tokenizer for itself."""

    path: str
    eos_token: str | None = None
    mask_token: str | None = None

    def load(self) -> Tokenizer:
        """Load it."""
        return load_tokenizer(self.path, self.eos_token, self.mask_token)


@dataclass
class Encoded:
    """The documents of one chunk as tokens."""

    tokens: NDArray[np.int32]
    """All documents one after the other, each with its end-of-text token."""
    lengths: list[int]
    sizes: list[int]
    """UTF-8 bytes of each document's text."""
    empty: int
    """Documents without a character, left out."""
    skipped: list[Skipped] = field(default_factory=list)


def encode_corpus(
    work: Iterable[Chunk], choice: TokenizerChoice, key: str, workers: int
) -> Iterator[tuple[Chunk, Encoded]]:
    """Each chunk with its tokens, in order. Raises what a worker raises; ResourceError when one dies."""
    if workers <= 1:
        tokenizer = choice.load()
        for chunk in work:
            yield chunk, encode_chunk(chunk, tokenizer, key)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of whatever was imported
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(choice, key))
    waiting: deque[tuple[Chunk, Future[Encoded]]] = deque()
    try:
        for chunk in work:
            waiting.append((chunk, pool.submit(_encode_in_worker, chunk)))
            if len(waiting) >= _AHEAD * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool as error:
        raise ResourceError("a worker process of llada prepare died (out of memory?); try fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def encode_chunk(chunk: Chunk, tokenizer: Tokenizer, key: str) -> Encoded:
    """Read and encode the documents of one chunk."""
    skipped: list[Skipped] = []
    parts: list[NDArray[np.int32]] = []
    sizes: list[int] = []
    empty = 0
    for text in documents(chunk, key, skipped):
        if not text:
            empty += 1
            continue
        ids = encode_long(tokenizer, text)
        if tokenizer.mask_id in ids:
            raise DataError(
                f"{tokenizer.path}: the tokenizer turns text of {chunk.sources[0].path} into its mask token"
            )
        parts.append(np.array([*ids, tokenizer.eos_id], np.int32))
        sizes.append(len(text.encode("utf-8")))
    tokens = np.concatenate(parts) if parts else np.empty(0, np.int32)
    return Encoded(tokens, [len(part) for part in parts], sizes, empty, skipped)


_worker: tuple[Tokenizer, str] | None = None
"""Set once in each worker process."""


def _start_worker(choice: TokenizerChoice, key: str) -> None:
    """Load the tokenizer in a worker; Ctrl-C is the parent's to handle."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = choice.load(), key


def _encode_in_worker(chunk: Chunk) -> Encoded:
    """`encode_chunk` with the worker's tokenizer."""
    assert _worker is not None
    return encode_chunk(chunk, *_worker)
