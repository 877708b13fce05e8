"""The program of one rank of `llada train`, which starts it once per rank.

Under torchrun or srun, `llada train` is itself a rank and calls `training_work`.

Megatron-Core is imported only inside `training_work`, after `device.install()`.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.console import message
from llada_megatron.launch.ranks.rank import PARENT_VARIABLE, StopRequest, Work, run_local_rank
from llada_megatron.launch.run_lock import RunLock
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.parallel.parent_death import die_with_parent

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.run import RunConfig


def training_work(run: RunConfig) -> Work:
    """The work of a rank of `run`; RANK and WORLD_SIZE, MASTER_ADDR and MASTER_PORT come from the environment.

    Rank 0 holds the run locks of the output directory and of the directory for copies.
    """

    def work(stop: StopRequest) -> dict[str, Any]:
        from llada_megatron.parallel import device

        device.install()
        from llada_megatron.launch.announcement import kernels
        from llada_megatron.parallel import topology
        from llada_megatron.parallel.fp8.recipes import require_device
        from llada_megatron.parallel.training.out_of_memory import explained
        from llada_megatron.parallel.training.trainer import Trainer

        rank = int(os.environ["RANK"])
        require_device(run.training.fp8)
        topology.join(rank, int(os.environ["WORLD_SIZE"]))
        used = kernels()
        if rank == 0 and used is not None:
            message(used)
        with _hold_directories(run) as locks:
            topology.initialize(run.layout, run.training.seed)
            with explained(run):
                trainer = Trainer(run)
            result = trainer.train(lambda: _must_stop(stop, locks))
        topology.leave()
        return result

    return work


@contextlib.contextmanager
def _hold_directories(run: RunConfig) -> Iterator[list[RunLock]]:
    """Rank 0 holds the run's directories while this is open; where one is in use, all ranks fail with the same message.

    Yields the run locks, on rank 0; none on other ranks.
    """
    from llada_megatron.parallel.collectives import on_rank_0

    locks: list[RunLock] = []
    with contextlib.ExitStack() as stack:

        def take(directory: str) -> None:
            locks.append(stack.enter_context(RunLock.take(directory, os.environ.get("SLURM_JOB_ID"))))

        def take_both() -> None:
            try:
                take(run.output_dir)
            except OSError as error:
                raise ResourceError(
                    f"{run.output_dir} cannot be written to ({error.strerror}); make room, correct its permissions, "
                    "or set another output_dir"
                ) from None
            if run.checkpoint.copy_to:
                with contextlib.suppress(OSError):  # storage that cannot be used is reported when a copy is made
                    take(run.checkpoint.copy_to)

        on_rank_0(take_both)
        yield locks


def _must_stop(stop: StopRequest, locks: list[RunLock]) -> bool:
    for lock in locks:
        lock.check()
    return stop()


def main(config: str) -> int:
    """Train the resolved run in the YAML file `config` as the rank that the environment names."""
    from llada_megatron.llada_moe.config import load_run

    die_with_parent(int(os.environ[PARENT_VARIABLE]))
    run = load_run(config)
    return run_local_rank(training_work(run), run.layout, Path(run.output_dir) / "logs")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
