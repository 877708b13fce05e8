"""Sampling many prompts in this process or in the ranks of a layout, each result on disk as soon as it is finished."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from llada_megatron.console import message
from llada_megatron.launch.ranks.rank import PARENT_VARIABLE, StopRequest, Work, run_local_rank
from llada_megatron.launch.sampling.batch_output import PartFile, part_path
from llada_megatron.launch.sampling.terminal_output import BatchProgress, ProgressLine
from llada_megatron.parallel.parent_death import die_with_parent
from llada_megatron.parallel.sampling.prompts import Prompt
from llada_megatron.parallel.sampling.settings import Settings

if TYPE_CHECKING:
    from llada_megatron.llada_moe.sampling.token_buffer import Request
    from llada_megatron.parallel.sampling.session import Session

_MOST_REFUSALS = 20
"""Messages about single prompts that are shown."""


@dataclass(frozen=True)
class PromptBatch:
    """Prompts whose results go to part files."""

    settings: Settings
    prompts: Sequence[Prompt]
    base: Path
    """Path of the part files, which are BASE.part-0, BASE.part-1, …: one for each replica of the model."""
    tolerant: bool
    """Whether a prompt that cannot be sampled is skipped; otherwise it ends the batch before anything is sampled."""
    finished: int = 0
    """Prompts that were finished by earlier runs."""
    progress: bool = True
    """Whether the progress is shown."""


@dataclass(frozen=True)
class BatchOutcome:
    """The outcome of one run of a batch."""

    checkpoint: str
    refused: list[str]
    """A message for each prompt that could not be sampled."""
    seconds: float
    """Wall time of sampling, without loading the model."""


def write_here(batch: PromptBatch) -> BatchOutcome:
    """Run a batch in this process. Raises what `Sampler.open` raises."""
    from llada_megatron.parallel.sampling.sampler import open_sampler

    with open_sampler(batch.settings) as sampler:
        return write(sampler.session, batch)


def write_in_ranks(batch: PromptBatch, logs: Path) -> BatchOutcome:
    """Run a batch with one process per rank of its layout, on this machine; their output goes to the folder `logs`.

    Raises:
        LladaError: a rank's own error, or a RankError that names the rank.
        Stopped: the batch was interrupted; finished results are in the part files.
    """
    from llada_megatron.launch.ranks.local import python_program, run_local

    message(f"sampling with {batch.settings.layout.world_size} processes")
    with tempfile.TemporaryDirectory(prefix="llada-") as scratch:
        path = Path(scratch) / "batch"
        path.write_bytes(pickle.dumps(batch))
        program = python_program("llada_megatron.launch.sampling.prompt_batch", str(path), str(logs))
        return BatchOutcome(**run_local(program, batch.settings.layout, logs, stopping="stopping").result)


def rank_work(settings: Settings, begin: Callable[[], PromptBatch]) -> Work:
    """The work of a rank, which is described by its environment.

    Args:
        settings: how prompts are sampled; its layout is the one that the ranks join.
        begin: returns the batch; called on all ranks once they have joined.
    """

    def work(_: StopRequest) -> dict[str, Any]:
        signal.signal(signal.SIGINT, _exit_at_once)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # there is no step that must be finished first
        from llada_megatron.parallel import device

        device.install()
        from megatron.core import parallel_state

        from llada_megatron.parallel import topology
        from llada_megatron.parallel.checkpoint.loaded_model import load_checkpoint
        from llada_megatron.parallel.sampling.session import Session

        topology.join(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        topology.initialize(settings.layout, settings.seed)
        batch = begin()
        loaded = load_checkpoint(batch.settings.checkpoint, settings.layout, fp8=settings.fp8)
        session = Session(loaded, batch.settings)
        coordinates = topology.coordinates()
        saves = coordinates.tensor == 0 and coordinates.pipeline == 0
        replicas = parallel_state.get_data_parallel_world_size()
        outcome = write(session, batch, coordinates.data, replicas, saves, shows=coordinates.rank == 0)
        topology.leave()
        return vars(outcome)

    return work


def _exit_at_once(number: int, _: FrameType | None) -> None:
    """End the process at once. Nothing is lost, because every finished result is on disk."""
    os._exit(128 + number)


def write(
    session: Session, batch: PromptBatch, replica: int = 0, replicas: int = 1, saves: bool = True, shows: bool = True
) -> BatchOutcome:
    """Sample this replica's share of a batch (collective over all ranks).

    Args:
        session: the loaded model.
        batch: the same on all ranks.
        replica: number of this replica, from 0.
        replicas: number of replicas.
        saves: whether this rank writes the results of its replica to a part file.
        shows: whether this rank shows the progress of all replicas.
    """
    jobs, refused = session.accepted(batch.prompts, batch.tolerant)
    for text in refused[:_MOST_REFUSALS]:
        message(f"passed over: {text}")
    if len(refused) > _MOST_REFUSALS:
        message(f"and {len(refused) - _MOST_REFUSALS} more prompts that were passed over")
    part = PartFile(part_path(batch.base, replica)) if saves else None
    _barrier()  # the progress is counted from the present size of the parts, so all of them must be open by now
    progress = (
        ProgressLine(BatchProgress(batch.base), batch.finished, batch.finished + len(jobs))
        if shows and batch.progress
        else None
    )
    _barrier()  # nobody appends to a part before its size is known
    began = time.perf_counter()

    def share(requests: list[Request]) -> list[Request]:
        return requests[replica::replicas]

    for event in session.run(jobs, share):
        if part is not None:
            for result in event.results:
                part.append(result)
        if progress is not None:
            progress.show()
    if part is not None:
        part.close()
    _barrier()
    if progress is not None:
        progress.show(last=True)
    if shows and session.graphs_note:
        message(session.graphs_note)
    return BatchOutcome(str(session.loaded.path), refused, time.perf_counter() - began)


def _barrier() -> None:
    """Wait for all ranks."""
    import torch

    if torch.distributed.get_world_size() > 1:
        torch.distributed.barrier()


def main(path: str, logs: str) -> int:
    """Run the batch in the file `path` as the rank that the environment names."""
    die_with_parent(int(os.environ[PARENT_VARIABLE]))
    batch: PromptBatch = pickle.loads(Path(path).read_bytes())
    return run_local_rank(rank_work(batch.settings, lambda: batch), batch.settings.layout, Path(logs))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
