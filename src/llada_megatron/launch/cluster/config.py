"""The description of a cluster: the keys of the YAML files in configs/clusters, and the checks of their values."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llada_megatron.launch.cluster.notation import MEMORY, gpu_request, host_list, seconds
from llada_megatron.launch.cluster.script_checks import (
    OPTION,
    check_each,
    check_environment,
    check_options,
    check_setup,
)
from llada_megatron.llada_moe.config.named import Named
from llada_megatron.llada_moe.config.parsing import Origins, Refuse, ScriptText, collector, parse


@dataclass(frozen=True, kw_only=True)
class ContainerConfig:
    """An image that every step runs in (pyxis: `srun --container-image`)."""

    image: str
    mounts: list[str] = field(default_factory=list)
    """`HOST:CONTAINER` paths; the run's data and output directory must be among them."""
    options: list[str] = field(default_factory=list)
    """Further options of srun, one in each item."""


@dataclass(frozen=True, kw_only=True)
class PreflightConfig:
    """What the preflight requires of every node."""

    timeout_s: int = 120
    """Seconds after which a node that has not answered is named and excluded."""
    min_free_disk_gb: float = 1.0
    """Free space in the run's output directory and in the temporary directory of each node."""
    min_memory_gb: float = 0.0
    """Free host memory on each node; 0 = not checked."""
    min_matmul_tflops: float = 0.0
    """Speed of a large matrix product on each GPU (or on the node's CPU); 0 = measured and reported only."""
    min_all_reduce_gb_s: float = 0.0
    """Bus bandwidth (10^9 bytes a second) of an all-reduce over all GPUs of a node, and of all nodes; 0 = measured and
    reported only."""
    max_clock_skew_s: float = 5.0
    """How far a node's clock may be from the others'."""


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """One cluster, or one partition of it. Keys without a value here are left to SLURM's own defaults."""

    ranks_per_node: int
    """Processes on a node: one per GPU, or as many as the CPUs can run where there is no GPU."""
    gpus_per_node: int | str = 0
    """`4`, or with a type `a100:4`; `gpu:4` and `gpu:a100:4` ask with --gres, which some sites want."""
    gpu: str | None = None
    """Kind of these GPUs, a name in configs/gpus or a YAML file: `llada submit` refuses what cannot fit on them,
    and FP8 that they cannot run; null = it does not know."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    cpus_per_node: int | None = None
    """Cores that the job's one task on each node asks for; null = all of an exclusive node."""
    memory_per_node: str | None = None
    """As SLURM writes it (`64G`; `0` = all)."""
    time: str = "1-00:00:00"
    """Time limit of one allocation (days-hours:minutes:seconds, or UNLIMITED); before it ends, the job is queued
    again."""
    exclusive: bool = True
    exclude: list[str] | str = field(default_factory=list)
    """Nodes that the job does not use: names, or SLURM's compressed lists such as `node[1-4,7]`."""
    sbatch_options: list[str] = field(default_factory=list)
    """Further options of sbatch, one in each item, for example `--comment=llada`."""
    container: ContainerConfig | None = None
    setup: list[ScriptText] = field(default_factory=list)
    """Lines of the script before anything starts: `module load …`, `source …/bin/activate`."""
    python: str | None = None
    """Interpreter on the nodes; null = `python` in a container, else the one that runs `llada submit`."""
    environment: list[str] = field(default_factory=list)
    """`NAME=value` for the script and every process; `$OTHER` in a value is replaced, `\\$` is a dollar sign."""
    signal_before_end_s: int = 300
    """How long before the time limit the job saves and is queued again."""
    requeue: bool = True
    """Whether the job may be queued again after a time limit, a preemption or a fault."""
    max_requeues: int = 100
    max_restarts: int = 3
    """How often the ranks may be started again in one allocation, and how many attempts of the job may follow one
    another, without a newer checkpoint."""
    lost_node: Literal["shrink", "requeue"] = "shrink"
    """What to do when a node is gone. shrink: go on without it where the layout allows a smaller data_parallel.
    requeue: queue the job again."""
    lost_node_wait_s: int = 30
    """How long the other nodes wait for a lost node to come back."""
    rendezvous_timeout_s: int = 600
    """How long the nodes of a job wait for each other."""
    preflight: PreflightConfig = field(default_factory=PreflightConfig)

    @property
    def gpus(self) -> int:
        """The number of GPUs of a node."""
        request = gpu_request(self.gpus_per_node)
        return request.count if request else 0

    @property
    def excluded(self) -> list[str]:
        """The parts of `exclude`, each a name or a compressed list."""
        texts = [self.exclude] if isinstance(self.exclude, str) else self.exclude
        return [part for text in texts for part in host_list(text) or [text]]


def validate_cluster(cluster: ClusterConfig, origins: Origins) -> None:
    """Check that the values can work, each alone and together.

    Raises:
        ConfigError: with file, line, key and what to change, one line per problem.
    """
    refuse, problems = collector(origins)
    _check_sizes(cluster, refuse)
    _check_times(cluster, refuse)
    _check_texts(cluster, refuse)
    problems.raise_if_any()


def _check_sizes(cluster: ClusterConfig, refuse: Refuse) -> None:
    ranks, gpus = cluster.ranks_per_node, cluster.gpus_per_node
    request = gpu_request(gpus)
    if ranks < 1:
        refuse("ranks_per_node", f"{ranks} must be at least 1")
    if request is None:
        refuse("gpus_per_node", f"{gpus!r} is not a number of GPUs; write {ranks}, a100:{ranks} or gpu:a100:{ranks}")
    elif request.count not in (0, ranks):
        refuse(
            "gpus_per_node",
            f"{gpus} is not ranks_per_node {ranks}: a rank uses one GPU; write {ranks}, or 0 for CPUs",
        )
    positive = {
        "cpus_per_node": cluster.cpus_per_node,
        "lost_node_wait_s": cluster.lost_node_wait_s,
        "rendezvous_timeout_s": cluster.rendezvous_timeout_s,
        "preflight.timeout_s": cluster.preflight.timeout_s,
        "preflight.max_clock_skew_s": cluster.preflight.max_clock_skew_s,
    }
    not_negative = {
        "max_requeues": cluster.max_requeues,
        "max_restarts": cluster.max_restarts,
        "preflight.min_free_disk_gb": cluster.preflight.min_free_disk_gb,
        "preflight.min_memory_gb": cluster.preflight.min_memory_gb,
        "preflight.min_matmul_tflops": cluster.preflight.min_matmul_tflops,
        "preflight.min_all_reduce_gb_s": cluster.preflight.min_all_reduce_gb_s,
    }
    for key, value in positive.items():
        if value is not None and value <= 0:
            refuse(key, f"{value} must be greater than 0")
    for key, value in not_negative.items():
        if value < 0:
            refuse(key, f"{value} must not be negative")


def _check_times(cluster: ClusterConfig, refuse: Refuse) -> None:
    limit, before = seconds(cluster.time), cluster.signal_before_end_s
    if limit is None:
        refuse("time", f"{cluster.time!r} is not a time limit; write days-hours:minutes:seconds, such as 1-00:00:00")
    elif limit < 60:
        refuse("time", f"{cluster.time} is less than a minute, the least that SLURM knows")
    elif before >= limit:
        refuse(
            "signal_before_end_s",
            f"{before} is not less than the time limit {cluster.time} = {limit} s; the job would never train",
        )
    if not 1 <= before <= 65535:
        refuse("signal_before_end_s", f"{before} must lie between 1 and 65535 (a limit of sbatch --signal)")


def _check_texts(cluster: ClusterConfig, refuse: Refuse) -> None:
    exclude = [cluster.exclude] if isinstance(cluster.exclude, str) else cluster.exclude
    for number, text in enumerate(exclude):
        if host_list(text) is None:
            key = "exclude" if isinstance(cluster.exclude, str) else f"exclude.{number}"
            refuse(key, f"{text!r} is not the name of a node, or a list such as node[1-4,7]")
    check_environment(cluster.environment, refuse)
    check_setup(cluster.setup, refuse)
    check_options(cluster.sbatch_options, refuse)
    request = gpu_request(cluster.gpus_per_node)
    if request and request.option == "gres" and any(option.startswith("--gres") for option in cluster.sbatch_options):
        refuse("gpus_per_node", f"{cluster.gpus_per_node} asks with --gres, and so do sbatch_options; keep one of them")
    if cluster.memory_per_node is not None and not MEMORY.fullmatch(cluster.memory_per_node):
        refuse("memory_per_node", f"{cluster.memory_per_node!r} is not a size as SLURM writes it, such as 64G; 0 = all")
    if cluster.container is not None:
        expected = "an option of srun such as --container-writable"
        check_each("container.options", cluster.container.options, OPTION, expected, refuse)
        mount = re.compile(r"/[^:,\s]*(:/[^:,\s]*(:[a-z+]+)?)?")
        check_each("container.mounts", cluster.container.mounts, mount, "HOST:CONTAINER, two absolute paths", refuse)


CLUSTERS = Named("cluster", "clusters")


def load_cluster(name_or_path: str | Path) -> ClusterConfig:
    """The validated cluster in `configs/clusters/NAME.yaml` or in a YAML file (which may name one as its `base`).

    Raises:
        ConfigError: with file, line, key and what to change, one line per problem.
    """
    cluster, origins = parse(ClusterConfig, CLUSTERS.load(str(name_or_path)))
    validate_cluster(cluster, origins)
    return cluster
