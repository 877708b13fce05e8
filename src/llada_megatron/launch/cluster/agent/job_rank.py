"""The program of one rank of a job; the agent of its node starts it.

Signals that ask it to stop are blocked until this program handles them, and may arrive more than once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from llada_megatron.launch.cluster.agent.stop_signals import NUMBERS
from llada_megatron.launch.cluster.fit import resized
from llada_megatron.launch.cluster.job import JobDirectory
from llada_megatron.launch.ranks.rank import PARENT_VARIABLE, StopRequest, run_local_rank
from llada_megatron.launch.ranks.training_rank import training_work
from llada_megatron.parallel.parent_death import die_with_parent


def main(job: str) -> int:
    """Train the run of the job directory as the rank that the environment names; returns the exit code."""
    from llada_megatron.llada_moe.config import load_run

    die_with_parent(int(os.environ[PARENT_VARIABLE]))
    stop = StopRequest(patient=True).listen(NUMBERS)
    run, ranks = load_run(JobDirectory(Path(job)).run), int(os.environ["WORLD_SIZE"])
    if ranks != run.layout.world_size:
        run = resized(run, ranks)
    return run_local_rank(training_work(run), run.layout, Path(run.output_dir) / "logs", stop)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
