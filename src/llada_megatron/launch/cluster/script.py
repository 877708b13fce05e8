"""The sbatch script of a job, from a run and a cluster."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.launch.cluster.notation import gpu_request
from llada_megatron.llada_moe.config.parsing import UNPRINTABLE
from llada_megatron.llada_moe.errors import ConfigError

if TYPE_CHECKING:
    from llada_megatron.launch.cluster.config import ClusterConfig

TEMPLATE = "job.sbatch.j2"

_REFERENCE = re.compile(r"(\\\$|\$[A-Za-z_]\w*|\$\{[A-Za-z_]\w*\})", re.ASCII)


def render(
    cluster: ClusterConfig, nodes: int, job: Path, name: str, directory: Path, node_counts: Sequence[int]
) -> str:
    """The script that trains on `nodes` nodes.

    Args:
        job: the job's directory, as an absolute path.
        name: the name that squeue shows.
        directory: the folder that relative paths of the run start from.
        node_counts: the numbers of nodes, up to `nodes`, on which the run can go on.

    Raises:
        ConfigError: a name or path holds a control character, which could end its line of the script.
    """
    import jinja2

    options = sbatch_options(cluster, nodes, job, name, directory)
    srun = srun_options(cluster)
    _check_lines([name, str(job), str(directory), python_of(cluster), *options, *srun, *cluster.environment])
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # a shell script; values are quoted by shlex
    )
    return templates.get_template(TEMPLATE).render(
        run_name=name,
        nodes=nodes,
        ranks_per_node=cluster.ranks_per_node,
        options=options,
        job=shlex.quote(str(job)),
        exports=[_export(line) for line in cluster.environment],
        setup=cluster.setup,
        srun=srun,
        requeue=cluster.requeue,
        node_counts=sorted(node_counts, reverse=True) if cluster.lost_node == "shrink" else [],
        max_requeues=cluster.max_requeues,
        max_without_progress=max(1, cluster.max_restarts),
        python=shlex.quote(python_of(cluster)),
    )


def sbatch_options(cluster: ClusterConfig, nodes: int, job: Path, name: str, directory: Path) -> list[str]:
    """The options of sbatch, with their values quoted as sbatch reads them."""
    values = {
        "job-name": name,
        "nodes": nodes,
        "ntasks-per-node": 1,
        **_gpus(cluster),
        "cpus-per-task": cluster.cpus_per_node,
        "mem": cluster.memory_per_node,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "reservation": cluster.reservation,
        "constraint": cluster.constraint,
        "exclude": ",".join(cluster.excluded) or None,
        "time": cluster.time,
        "signal": f"B:USR1@{cluster.signal_before_end_s}",
        "chdir": directory,
        "output": str(job / "job.out").replace("%", "%%"),
        "open-mode": "append",
    }
    options = [f"--{key}={shlex.quote(str(value))}" for key, value in values.items() if value is not None]
    switches = {"--exclusive": cluster.exclusive, "--no-kill": cluster.lost_node == "shrink"}
    options += [switch for switch, wanted in switches.items() if wanted]
    return [*options, "--requeue" if cluster.requeue else "--no-requeue", *cluster.sbatch_options]


def srun_options(cluster: ClusterConfig) -> list[str]:
    """The options of srun for starting a program on every node: one task each, which goes on when others fail."""
    options = ['--nodes="$SLURM_JOB_NUM_NODES"', '--ntasks="$SLURM_JOB_NUM_NODES"', "--ntasks-per-node=1"]
    options += ["--export=ALL", "--mpi=none", "--kill-on-bad-exit=0", "--wait=0"]
    options.append("--cpu-bind=none")  # otherwise SLURM may bind the task, and with it all ranks, to a single core
    if cluster.cpus_per_node is not None:
        options.append(f"--cpus-per-task={cluster.cpus_per_node}")  # not inherited from sbatch since SLURM 22.05
    if cluster.lost_node == "shrink":
        options.append("--no-kill")
    if cluster.container is not None:
        options.append('--container-workdir="$PWD"')
        options.append("--container-image=" + shlex.quote(cluster.container.image))
        if cluster.container.mounts:
            options.append("--container-mounts=" + shlex.quote(",".join(cluster.container.mounts)))
        options += map(shlex.quote, cluster.container.options)
    return options


def python_of(cluster: ClusterConfig) -> str:
    """The interpreter on the nodes."""
    return cluster.python or ("python" if cluster.container is not None else sys.executable)


def _gpus(cluster: ClusterConfig) -> dict[str, str]:
    request = gpu_request(cluster.gpus_per_node)
    return {request.option: request.value} if request and request.count else {}


def _check_lines(texts: Iterable[str]) -> None:
    for text in texts:
        if (found := UNPRINTABLE.search(text)) is not None:
            raise ConfigError(f"{text!r} holds the character {found[0]!r}, which a job script cannot hold; rename it")


def _export(line: str) -> str:
    """An assignment for the shell: `$NAME` and `${NAME}` are replaced there, all else is quoted."""
    name, _, value = line.partition("=")
    return f"{name}=" + "".join(_quoted(part) for part in _REFERENCE.split(value) if part)


def _quoted(part: str) -> str:
    if part == "\\$":
        return "'$'"
    return f'"{part}"' if _REFERENCE.fullmatch(part) else shlex.quote(part)
