"""The program of a rank in the launcher's tests: joins over gloo, then behaves as its first argument says."""

import os
import signal
import sys
import time
from pathlib import Path

import torch

from llada_megatron.launch.ranks import rank
from llada_megatron.launch.ranks.rank import StopRequest
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.errors import DataError
from llada_megatron.parallel.parent_death import die_with_parent
from llada_megatron.parallel.training.heartbeat import Heartbeat

LAYOUT = LayoutConfig(data_parallel=2)


def work(stop: StopRequest) -> dict:
    behaviour, directory = sys.argv[1], Path(sys.argv[2])
    torch.distributed.init_process_group("gloo")
    me = torch.distributed.get_rank()
    (directory / f"pid-{me}").write_text(str(os.getpid()))
    print("noise on stdout")
    os.write(2, b"noise from C\n")
    total = torch.ones(1)
    torch.distributed.all_reduce(total)
    if behaviour == "fail" and me == 1:
        raise ValueError("the second rank\nhas a reason")
    if behaviour == "fail-alone" and me == 0:  # the other rank waits and is ended by the agent
        raise ValueError("only the first")
    if behaviour == "fail-alone":
        time.sleep(600)
    if behaviour == "hang":  # after some steps the second rank stays one behind the first
        heartbeat = Heartbeat.of_rank(me)
        for step in range(6 - me):
            heartbeat.beat(step, "step")
            time.sleep(0.4)
        time.sleep(600)
    if behaviour == "user-error":
        raise DataError("the corpus is empty; give it text")
    if behaviour == "killed" and me == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    steps = 0
    while behaviour in ("run", "deaf", "fail", "killed"):
        asked = torch.tensor([int(stop()) if behaviour != "deaf" else 0])
        torch.distributed.all_reduce(asked)
        steps += 1
        if asked.item():
            break
        time.sleep(0.02)
    torch.distributed.destroy_process_group()
    return {
        "sum": total.item(),
        "steps": steps,
        "threads": [os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]],
    }


if __name__ == "__main__":
    die_with_parent(int(os.environ["LLADA_PARENT"]))
    sys.exit(rank.run_local_rank(work, LAYOUT, Path(sys.argv[2]) / "logs"))
