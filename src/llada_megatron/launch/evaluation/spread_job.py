"""Running one piece of work with a loaded model: in this process, on ranks started here, or on those of a job."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.console import message
from llada_megatron.launch.ranks.rank import StopRequest, Work, run_joined_rank
from llada_megatron.launch.ranks.rank_info import RankInfo, check_world, find_rank_info
from llada_megatron.llada_moe.config.layout import LayoutConfig

if TYPE_CHECKING:
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel


@dataclass(frozen=True)
class SpreadJob:
    """What every rank of a layout does with its part of a model."""

    checkpoint: str
    layout: LayoutConfig
    work: Callable[[LoadedModel], dict[str, Any]]
    """Collective; an object that can be pickled. What rank 0 returns, of JSON values, is the result."""
    fp8: str | None = None
    """As for `open_checkpoint`."""


def run_spread(job: SpreadJob, local: bool = False) -> dict[str, Any] | None:
    """Run a job. None on every rank but the first of a job that torchrun or srun started.

    Args:
        job: what is run.
        local: start the ranks here, even in a job of torchrun or srun.

    Raises:
        LladaError: the work's own error, or a RankError that names the rank.
    """
    rank_info = None if local else find_rank_info()
    if rank_info is not None and rank_info.world_size > 1:
        return _as_rank(job, rank_info)
    if job.layout.world_size == 1:
        return _here(job)
    return _in_ranks(job)


def _here(job: SpreadJob) -> dict[str, Any]:
    from llada_megatron.parallel import device

    device.install()
    from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint

    with open_checkpoint(job.checkpoint, fp8=job.fp8) as loaded:
        return job.work(loaded)


def _in_ranks(job: SpreadJob) -> dict[str, Any]:
    """On ranks of this machine; their logs are kept if one fails."""
    from llada_megatron.launch.ranks.local import python_program, run_local

    message(f"evaluating with {job.layout.world_size} processes")
    logs = Path(tempfile.mkdtemp(prefix="llada-eval-"))
    file = logs / "job"
    file.write_bytes(pickle.dumps(job))
    program = python_program("llada_megatron.launch.evaluation.evaluation_rank", str(file), str(logs))
    result = run_local(program, job.layout, logs, stopping="stopping").result
    shutil.rmtree(logs, ignore_errors=True)
    return result


def _as_rank(job: SpreadJob, rank_info: RankInfo) -> dict[str, Any] | None:
    check_world(rank_info, job.layout)
    os.environ.update(rank_info.environment())
    os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
    logs = Path(tempfile.mkdtemp(prefix="llada-eval-"))
    result, _ = run_joined_rank(rank_work(job), job.layout, logs, rank_info.rank)
    return result if rank_info.rank == 0 else None


def rank_work(job: SpreadJob) -> Work:
    """The work of a rank of the job's layout."""

    def work(_: StopRequest) -> dict[str, Any]:
        from llada_megatron.parallel import device

        device.install()
        from llada_megatron.parallel import topology
        from llada_megatron.parallel.checkpoint.loaded_model import load_checkpoint

        topology.join(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        topology.initialize(job.layout, seed=0)
        result = job.work(load_checkpoint(job.checkpoint, job.layout, fp8=job.fp8))
        topology.leave()
        return result

    return work
