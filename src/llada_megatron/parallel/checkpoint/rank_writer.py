"""One rank's part of a checkpoint, written in this process or in a forked one.

Megatron's torch_dist strategy plans which rank writes what, and Megatron's own function writes each file. What comes
between the two is done here, for three reasons (the files named are those of megatron-core 0.16.1; 0.19.2 does the same
unless noted):

* strategies/filesystem_async.py:54 starts a spawned Manager process per rank to carry one result, also for a
  synchronous save: 4-6 s, some 210 MB, and an orphan when the rank is killed. The queue that it keeps in
  `_results_queue` is put there beforehand instead.
* strategies/filesystem_async.py:266 forks a process per file and waits for ever if one is killed; the threads of
  0.19.2 lose the cause of a failed write. Here a rank writes its file itself and reports the exception.
* Steps that only rank 0 takes (serialization.py:411 `common.pt`, state_dict_saver.py:243 `.metadata`) sit between
  collectives, so a full disk there leaves the other ranks waiting. The plan is therefore handed back, and each such
  step is followed by a collective that tells all ranks how it went (collectives.py).
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import multiprocessing
import os
import queue
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from llada_megatron.parallel.checkpoint.manifest import FileRecord, record
from llada_megatron.parallel.collectives import explain
from llada_megatron.parallel.parent_death import die_with_parent


class WritePlan(NamedTuple):
    """What this rank writes, and what rank 0 needs to complete the checkpoint."""

    writer: FileSystemWriterAsync
    metadata: Any
    """Description of all ranks' tensors, on rank 0; None on the others."""
    common: bytes
    """Content of `common.pt` at the time of the save, on rank 0; empty on the others."""

    @property
    def size(self) -> int:
        """Bytes of tensors and objects that this rank writes."""
        buckets = [content for _, _, content in self.writer.write_buckets or []]
        objects = sum(data.getbuffer().nbytes for objects, _ in buckets for _, data in objects)
        return objects + sum(tensor.nbytes for _, tensors in buckets for _, tensor in tensors)


class WriteResult(NamedTuple):
    """What this rank wrote: torch's results and the files with their digests, or why it failed."""

    results: list[Any]
    files: dict[str, FileRecord]
    error: str | None


class _PlanOnly(TorchDistSaveShardedStrategy):
    """Megatron's strategy, stopped between planning and writing."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *_: Any) -> Any:
        return writer, planned[1]


def plan(state: dict[str, Any], directory: Path) -> WritePlan:
    """Agree with the other ranks on which of them writes what (collective). `state` cannot be used afterwards."""
    filesystem_async._results_queue = queue.SimpleQueue()
    sharded, common = save_preprocess(state)
    strategy = _PlanOnly("torch_dist", 1, thread_count=1)
    if parallel_state.model_parallel_is_initialized():
        replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if replicas.size() > 1:  # share the writing out among the ranks that hold the same weights
            FullyParallelSaveStrategyWrapper(strategy, replicas).apply_saving_parallelization(sharded)
    if "async_strategy" in inspect.signature(strategy.async_save).parameters:  # its default needs another package
        writer, metadata = strategy.async_save(sharded, str(directory), async_strategy="mcore")
    else:
        writer, metadata = strategy.async_save(sharded, str(directory))
    content = io.BytesIO()
    if torch.distributed.get_rank() == 0:
        torch.save(common, content)
    return WritePlan(writer, metadata, content.getvalue())


def stage(planned: WritePlan) -> list[Any]:
    """The buckets of the plan with their tensors in host memory; only those on a GPU are copied."""
    return FileSystemWriterAsync.preload_tensors(planned.writer.write_buckets or [], True)


def write(planned: WritePlan, staged: list[Any] | None = None) -> WriteResult:
    """Write this rank's files, wait until the storage holds them, and read them back. Never raises."""
    transforms = [planned.writer.transforms] if hasattr(planned.writer, "transforms") else []
    results: list[Any] = []
    files: dict[str, FileRecord] = {}
    try:
        for index, bucket in enumerate(stage(planned) if staged is None else staged):
            outcome: queue.Queue[Any] = queue.Queue()
            working: queue.Queue[Any] = queue.Queue()  # Megatron takes one item off it when done
            working.put(index)
            FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, outcome, working, True)
            _, written = outcome.get_nowait()
            if isinstance(written, Exception):
                raise written
            results.extend(written)
            files[Path(bucket[0]).name] = record(Path(bucket[0]))
    except Exception as error:  # reported to all ranks by the caller
        return WriteResult([], {}, explain(error))
    return WriteResult(results, files, None)


def why_not_asynchronous() -> str | None:
    """Why this process cannot write in the background, or None if it can."""
    if "fork" not in multiprocessing.get_all_start_methods():
        return f"{sys.platform} has no fork()"
    if multiprocessing.current_process().daemon:
        return "this process may not have children (it is a daemon of multiprocessing)"
    return None


class BackgroundWrite:
    """A forked process that writes the state as it was in memory when the process was started.

    The child has a copy-on-write image of the memory, so the trainer may go on changing the weights. The child touches
    no GPU, starts no thread, and dies with its parent.
    """

    def __init__(self, planned: WritePlan) -> None:
        buckets = stage(planned)
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        arguments = (planned, buckets, sender, os.getpid())
        self._process = context.Process(target=_write_in_child, args=arguments, daemon=True)
        with _collection_paused():
            self._process.start()
        sender.close()

    def done(self) -> bool:
        """Whether the child has finished or died."""
        return self._receiver.poll(0)

    def wait(self) -> WriteResult:
        """Wait for the child, and return what it wrote."""
        try:
            written = self._receiver.recv()
        except EOFError:
            self._process.join()
            status = f"exit code {self._process.exitcode}; -9: killed, often for memory"
            written = WriteResult([], {}, f"the writing process ended early ({status})")
        self._process.join()
        self._receiver.close()
        return written


@contextlib.contextmanager
def _collection_paused() -> Any:
    """No garbage collection inside the `with` block: a forked child must not free memory of a GPU."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _write_in_child(planned: WritePlan, buckets: list[Any], sender: Connection, parent: int) -> None:
    for number in (signal.SIGINT, signal.SIGUSR1):  # they can reach the whole group or step; the trainer decides
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent(parent)
    torch.set_num_threads(1)  # the parent's thread pool does not exist here
    sender.send(write(planned, buckets))
    sender.close()
