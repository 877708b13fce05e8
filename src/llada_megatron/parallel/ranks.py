"""Running a function on N ranks of this machine, one per GPU or on the CPU, with a hard time limit.

For the benchmarks and the tests. Without a GPU, ranks are forked from a server that has the imports done
(multiprocessing's fork server): it runs no computation of its own, so a fork of it is safe whatever this process did
before, and the imports are paid once. With GPUs each rank is a new process: a fork of one that has asked CUDA anything
cannot use it. Rendezvous is a file: no port is needed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

from llada_megatron.llada_moe.errors import ResourceError

PRELOADED = ["llada_megatron.parallel.preload"]
"""What the server of the forks imports when it starts, at the first call of `run_ranks`."""

DEFAULT_TIMEOUT_S = 180.0
_GRACE_S = 5.0
"""What the other ranks get to fail by themselves after the first failure."""


class RankFailure(AssertionError):
    """A rank failed; the message holds the stack of the first one."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout: float = DEFAULT_TIMEOUT_S
) -> list[Any]:
    """Call `function(*arguments)` on every rank of a world, and return what each rank returned, in rank order.

    `function` must be a top-level function of an importable module; arguments and results are pickled. The world
    process group is initialised before the call and destroyed after it.

    Raises:
        ResourceError: there are GPUs, and fewer than ranks.
        RankFailure: a rank raised, died, or the time ran out. No process is left behind.
    """
    context = _context(world_size)
    with tempfile.TemporaryDirectory(prefix="ranks-") as directory:
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            payload = pickle.dumps((function, arguments))
            process = context.Process(target=_rank, args=(payload, rank, world_size, directory, timeout, sender))
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            return _collect(pipes, processes, timeout)
        finally:
            _end(processes)


def _context(world_size: int) -> Any:
    """How processes are started: new ones where there are GPUs, else forks of a server."""
    from llada_megatron.parallel import device

    if not device.cuda_available():
        return _server()
    import torch

    gpus = torch.cuda.device_count()
    if world_size > gpus:
        raise ResourceError(
            f"{world_size} ranks need a GPU each, and this machine shows {gpus}: take a smaller layout, or hide the "
            'GPUs (CUDA_VISIBLE_DEVICES="") to run all ranks on the CPU'
        )
    return multiprocessing.get_context("spawn")


def _server() -> Any:
    # the server does not see changes of sys.path, only the environment
    paths = [path for path in sys.path if path]
    context = multiprocessing.get_context("forkserver")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    try:
        context.set_forkserver_preload(PRELOADED)
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.__setitem__("PYTHONPATH", before)
    return context


def _rank(payload: bytes, rank: int, world_size: int, directory: str, timeout: float, results: Connection) -> None:
    try:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
        import torch

        from llada_megatron.parallel import (
            preload,  # noqa: F401  (a fork of the server has it already)
            topology,
        )

        function, arguments = pickle.loads(payload)
        topology.join(rank, world_size, f"file://{directory}/store", timeout)
        value = function(*arguments)
        results.send_bytes(pickle.dumps((time.time(), True, value)))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except BaseException:
        results.send_bytes(pickle.dumps((time.time(), False, traceback.format_exc())))
        results.close()
        for child in multiprocessing.active_children():
            child.terminate()
        os._exit(1)


def _collect(pipes: list[Connection], processes: list[Any], timeout: float) -> list[Any]:
    """Results in rank order; after a first failure the others get a short grace, then the earliest one is raised."""
    deadline, values, failures = time.monotonic() + timeout, {}, []
    while len(values) + len(failures) < len(pipes):
        open_pipes = [pipe for pipe in pipes if not pipe.closed]
        ready = wait(open_pipes, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = pipes.index(pipe)
            try:
                when, fine, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                processes[rank].join(_GRACE_S)
                when, fine, value = 0.0, False, f"died with exit code {processes[rank].exitcode}"
            pipe.close()
            if fine:
                values[rank] = value
            else:
                failures.append((when, rank, value))
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    if failures:
        _, rank, text = min(failures)
        raise RankFailure(f"rank {rank} of {len(pipes)}:\n{text}")
    if len(values) < len(pipes):
        late = sorted(set(range(len(pipes))) - values.keys())
        raise RankFailure(f"no answer from rank {late} within {timeout:.0f} s")
    return [values[rank] for rank in range(len(pipes))]


def _end(processes: list[Any]) -> None:
    """Wait for ranks that are done; end the others with everything they started."""
    for process in processes:
        process.join(_GRACE_S)
        if not process.is_alive():
            continue
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL)
        process.join()
