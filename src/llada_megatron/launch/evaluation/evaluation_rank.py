"""The program of a rank that `spread_job` starts on this machine."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

from llada_megatron.launch.evaluation.spread_job import SpreadJob, rank_work
from llada_megatron.launch.ranks.rank import PARENT_VARIABLE, run_local_rank
from llada_megatron.parallel.parent_death import die_with_parent


def main(file: str, logs: str) -> int:
    """Run the job in `file` as the rank that the environment names."""
    die_with_parent(int(os.environ[PARENT_VARIABLE]))
    job: SpreadJob = pickle.loads(Path(file).read_bytes())
    return run_local_rank(rank_work(job), job.layout, Path(logs))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
