"""Finding which rank this process is in a job that torchrun or srun has started."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llada_megatron.llada_moe.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llada_megatron.llada_moe.config.layout import LayoutConfig

_FIRST_PORT, _PORTS = 20000, 12000
"""Ports for jobs under SLURM, below the range that systems assign to programs (from 32768 on Linux)."""


@dataclass(frozen=True)
class RankInfo:
    """One process of a running job."""

    launcher: Literal["torchrun", "srun"]
    rank: int
    local_rank: int
    world_size: int
    address: str
    """Host that rank 0 runs on."""
    port: int
    """Port on that host."""

    def environment(self) -> dict[str, str]:
        """The variables that torch.distributed reads."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def find_rank_info(environment: Mapping[str, str] = os.environ) -> RankInfo | None:
    """The rank that torchrun or srun gave this process; None when neither started it.

    SLURM's batch script itself is not a rank: only the tasks of a step (srun) are.

    Raises:
        ConfigError: some, but not all variables of a launcher are set.
        ResourceError: SLURM's list of nodes cannot be read.
    """
    if "TORCHELASTIC_RUN_ID" in environment or {"RANK", "WORLD_SIZE"} <= environment.keys():
        return _from_torchrun(environment)
    if {"SLURM_PROCID", "SLURM_STEP_ID"} <= environment.keys():
        return _from_srun(environment)
    return None


def check_world(info: RankInfo, layout: LayoutConfig) -> None:
    """Refuse a job with another number of processes than the layout has ranks.

    Raises:
        ConfigError: with the arithmetic and the option to change.
    """
    if info.world_size == layout.world_size:
        return
    arithmetic = (
        f"tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x context {layout.context_parallel} x "
        f"data {layout.data_parallel} = {layout.world_size} ranks"
    )
    without_data = layout.world_size // layout.data_parallel
    remedy = f"start {layout.world_size} processes ({_how_many(info.launcher)})"
    if info.world_size % without_data == 0:
        remedy += f", or set layout.data_parallel={info.world_size // without_data}"
    raise ConfigError(f"the layout needs {arithmetic}, but {info.launcher} started {info.world_size}; {remedy}")


def _how_many(launcher: str) -> str:
    return "torchrun --nproc-per-node and --nnodes" if launcher == "torchrun" else "srun --ntasks"


def _from_torchrun(environment: Mapping[str, str]) -> RankInfo:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in environment]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not set although other variables of a distributed job are; "
            "start the ranks with torchrun or srun, or unset RANK and WORLD_SIZE to start them on this machine"
        )
    rank = int(environment["RANK"])
    return RankInfo(
        "torchrun",
        rank,
        int(environment.get("LOCAL_RANK", rank)),
        int(environment["WORLD_SIZE"]),
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
    )


def _from_srun(environment: Mapping[str, str]) -> RankInfo:
    """The rank of a task of srun; MASTER_ADDR and MASTER_PORT override the first host and the computed port."""
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS"))
    if tasks is None:
        raise ConfigError("SLURM_STEP_NUM_TASKS and SLURM_NTASKS are not set; start the ranks with srun")
    job, step = int(environment.get("SLURM_JOB_ID", 0)), int(environment["SLURM_STEP_ID"])
    return RankInfo(
        "srun",
        int(environment["SLURM_PROCID"]),
        int(environment.get("SLURM_LOCALID", 0)),
        int(tasks),
        environment.get("MASTER_ADDR") or _head_node(environment),
        int(environment.get("MASTER_PORT") or _FIRST_PORT + (job * 16 + step) % _PORTS),
    )


def _head_node(environment: Mapping[str, str]) -> str:
    """The first host of the step. It is not guessed: with localhost, for example, every node would wait for itself."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    remedy = "set MASTER_ADDR to the host that rank 0 runs on"
    if not nodes:
        raise ResourceError(f"SLURM_STEP_NODELIST is not set; {remedy}")
    if not set(nodes) & set("[,"):
        return nodes
    try:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True, timeout=60
        ).stdout.split()
    except FileNotFoundError:
        raise ResourceError(f"scontrol is not in PATH, so the hosts of {nodes} are unknown; {remedy}") from None
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        raise ResourceError(f"scontrol cannot read the hosts of {nodes} ({said}); {remedy}") from None
    if not hosts:
        raise ResourceError(f"scontrol names no host for {nodes}; {remedy}")
    return hosts[0]
