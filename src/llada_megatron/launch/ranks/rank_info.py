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

_LAST_STEP = 0xFFFFFFF0 - 1
"""Numbers above it are no tasks of a step: the batch script, an interactive shell of salloc and the like (slurm.h)."""

_HERE = "to start the ranks on this machine, give --local"


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

    SLURM's batch script itself is not a rank, and neither is a shell (`salloc`, `srun --pty bash`): only the tasks of
    a step are.

    Raises:
        ConfigError: some, but not all variables of a launcher are set, or they do not fit each other.
        ResourceError: SLURM's list of nodes cannot be read.
    """
    if "TORCHELASTIC_RUN_ID" in environment or {"RANK", "WORLD_SIZE"} <= environment.keys():
        return _from_torchrun(environment)
    if {"SLURM_PROCID", "SLURM_STEP_ID"} <= environment.keys():
        return None if _in_a_shell(environment) else _from_srun(environment)
    if half := {"RANK", "WORLD_SIZE"} & environment.keys():
        missing = {"RANK", "WORLD_SIZE"} - half
        raise ConfigError(f"{half.pop()} is set, but not {missing.pop()}; {_way_out('RANK and WORLD_SIZE')}")
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if environment.get(name, "1") != "1":
            raise ConfigError(
                f"mpirun started {environment[name]} processes ({name}), which cannot find each other; start them "
                f"with torchrun or srun; {_HERE} and start one process"
            )
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
    if info.world_size == 1:  # a shell, or variables that were left over
        remedy += f"; or, {_HERE}"
    raise ConfigError(f"the layout needs {arithmetic}, but {info.launcher} started {info.world_size}; {remedy}")


def _how_many(launcher: str) -> str:
    return "torchrun --nproc-per-node and --nnodes" if launcher == "torchrun" else "srun --ntasks"


def _way_out(variables: str) -> str:
    return f"start the ranks with torchrun or srun; {_HERE}, or unset {variables}"


def _in_a_shell(environment: Mapping[str, str]) -> bool:
    """Whether a person works in this step: a shell of salloc, or the one task of `srun --pty`."""
    if _number(environment, "SLURM_STEP_ID", "SLURM_STEP_ID") > _LAST_STEP:
        return True
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")
    return tasks == "1" and bool({"SLURM_PTY_PORT", "SLURM_PTY_WIN_COL"} & environment.keys())


def _number(environment: Mapping[str, str], name: str, variables: str, least: int = 0, most: int = 2**32) -> int:
    """A variable as a number. Raises ConfigError: it is none; the message names `variables` as those to unset."""
    text = environment[name]
    if not text.isdecimal() or len(text) > 10 or not least <= int(text) <= most:
        raise ConfigError(f"{name}={text!r} is not a number from {least} to {most}; {_way_out(variables)}")
    return int(text)


def _from_torchrun(environment: Mapping[str, str]) -> RankInfo:
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    variables = ", ".join([*(name for name in ("TORCHELASTIC_RUN_ID",) if name in environment), "RANK and WORLD_SIZE"])
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not set although other variables of a distributed job are; {_way_out(variables)}"
        )
    world_size = _number(environment, "WORLD_SIZE", variables, least=1)
    rank = _number(environment, "RANK", variables, most=world_size - 1)
    local = {"LOCAL_RANK": environment.get("LOCAL_RANK") or str(rank)}
    return RankInfo(
        "torchrun",
        rank,
        _number(local, "LOCAL_RANK", variables, most=world_size - 1),
        world_size,
        environment["MASTER_ADDR"],
        _number(environment, "MASTER_PORT", variables, least=1, most=65535),
    )


def _from_srun(environment: Mapping[str, str]) -> RankInfo:
    """The rank of a task of srun; MASTER_ADDR and MASTER_PORT override the first host and the computed port."""
    variables = "SLURM_PROCID and SLURM_STEP_ID"
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    name = next((name for name in names if environment.get(name)), None)
    if name is None:
        raise ConfigError(f"{' and '.join(names)} are not set; {_way_out(variables)}")
    values = {"SLURM_JOB_ID": "0", "SLURM_LOCALID": "0"} | {key: value for key, value in environment.items() if value}
    tasks = _number(values, name, variables, least=1)
    rank = _number(values, "SLURM_PROCID", variables, most=tasks - 1)
    job, step = _number(values, "SLURM_JOB_ID", variables), _number(values, "SLURM_STEP_ID", variables)
    port = {"MASTER_PORT": environment.get("MASTER_PORT") or str(_FIRST_PORT + (job * 16 + step) % _PORTS)}
    return RankInfo(
        "srun",
        rank,
        _number(values, "SLURM_LOCALID", variables),
        tasks,
        environment.get("MASTER_ADDR") or _head_node(environment),
        _number(port, "MASTER_PORT", "MASTER_PORT", least=1, most=65535),
    )


def _head_node(environment: Mapping[str, str]) -> str:
    """The first host of the step. It is not guessed: with localhost, for example, every node would wait for itself."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    remedy = f"set MASTER_ADDR to the host that rank 0 runs on; {_HERE}"
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
