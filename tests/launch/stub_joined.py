"""The program of a rank that torchrun or srun starts in tests: finds its rank, joins over gloo, sums, may fail."""

import os
import sys
from pathlib import Path

import torch

from llada_megatron.launch.ranks.rank import StopRequest, run_joined_rank
from llada_megatron.launch.ranks.rank_info import check_world, find_rank_info
from llada_megatron.llada_moe.config.layout import LayoutConfig

LAYOUT = LayoutConfig(data_parallel=2)


def work(stop: StopRequest) -> dict:
    torch.distributed.init_process_group("gloo")
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    print("noise")
    print(f"progress of rank {torch.distributed.get_rank()}", file=sys.stderr)
    if sys.argv[1] == "fail" and torch.distributed.get_rank() == 1:
        raise ValueError("the reason")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return {"sum": total.item()}


if __name__ == "__main__":
    info = find_rank_info()
    check_world(info, LAYOUT)
    os.environ.update(info.environment())
    result, stopped = run_joined_rank(work, LAYOUT, Path(sys.argv[2]) / "logs", info.rank)
    if info.rank == 0:
        print(info.launcher, result, stopped)
