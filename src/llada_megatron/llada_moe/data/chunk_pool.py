"""Work on the chunks of a corpus in several processes, the results in the order of the corpus whatever their number."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from llada_megatron.llada_moe.data.corpus import Chunk
from llada_megatron.llada_moe.errors import ResourceError

Result = TypeVar("Result")

_AHEAD = 4
"""Chunks read ahead per worker: enough to keep it busy, few enough to bound memory."""


def map_chunks(
    work: Iterable[Chunk],
    function: Callable[[Chunk], Result],
    workers: int,
    start: Callable[..., None],
    arguments: tuple[Any, ...] = (),
) -> Iterator[tuple[Chunk, Result]]:
    """Each chunk with `function(chunk)`, in order, computed in new processes that called `start(*arguments)` first.

    Raises what a worker raises; ResourceError when one dies.
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of whatever was imported
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=start, initargs=arguments)
    waiting: deque[tuple[Chunk, Future[Result]]] = deque()
    try:
        for chunk in work:
            waiting.append((chunk, pool.submit(function, chunk)))
            if len(waiting) >= _AHEAD * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    except BrokenProcessPool as error:
        raise ResourceError(
            "a worker process of llada prepare died (out of memory?); try fewer --workers, and another tokenizer: one "
            "that takes very much time or memory for a part of the text is ended"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
