"""What a cluster file can mean: each value alone, and against the others."""

from __future__ import annotations

import re
from collections.abc import Iterable

from llada_megatron.launch.cluster.config import ClusterConfig
from llada_megatron.llada_moe.config.parsing import Origins
from llada_megatron.llada_moe.config.validation import Refuse, collector

_TIME = re.compile(
    r"((?P<days>\d+)-(?P<day_hours>\d+)(:(?P<day_minutes>\d+)(:(?P<day_seconds>\d+))?)?"
    r"|((?P<hours>\d+):(?=\d+:))?(?P<minutes>\d+)(:(?P<seconds>\d+))?)"
)
_UNITS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=[^\0\n]*")
_NODE_LIST = re.compile(r"[^\s,;]+")
_MEMORY = re.compile(r"\d+[KMGT]?")
_OURS = ("nodes", "ntasks", "ntasks-per-node", "output", "error", "open-mode", "signal", "chdir", "export", "array")
"""Options of sbatch that the script depends on."""
_KEYS = {"mem": "memory_per_node", "cpus-per-task": "cpus_per_node", "no-requeue": "requeue"}
_KEYS |= {name: name for name in ("partition", "account", "qos", "reservation", "constraint", "time", "exclusive")}
_KEYS |= {name: name.replace("-", "_") for name in ("exclude", "requeue", "gpus-per-node")}
"""Options of sbatch that keys of the cluster file stand for."""


def validate_cluster(cluster: ClusterConfig, origins: Origins) -> None:
    """Raises: ConfigError: with file, line, key and what to change, one line per problem."""
    refuse, problems = collector(origins)
    _check_sizes(cluster, refuse)
    _check_times(cluster, refuse)
    _check_texts(cluster, refuse)
    problems.raise_if_any()


def seconds(time: str) -> int | None:
    """A time limit as SLURM writes it, in seconds; None for what it does not understand.

    Its forms (sbatch(1), --time): M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.
    """
    found = _TIME.fullmatch(time)
    if found is None:
        return None
    parts = {name.removeprefix("day_"): int(value) for name, value in found.groupdict().items() if value is not None}
    return sum(_UNITS[name] * value for name, value in parts.items())


def _check_sizes(cluster: ClusterConfig, refuse: Refuse) -> None:
    ranks, gpus = cluster.ranks_per_node, cluster.gpus_per_node
    if ranks < 1:
        refuse("ranks_per_node", f"{ranks} must be at least 1")
    if gpus not in (0, ranks):
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
    def each(key: str, values: Iterable[str], pattern: re.Pattern[str], expected: str) -> None:
        for number, value in enumerate(values):
            if not pattern.fullmatch(value):
                refuse(f"{key}.{number}", f"{value!r} is not {expected}")

    each("environment", cluster.environment, _VARIABLE, "NAME=value")
    each("exclude", cluster.exclude, _NODE_LIST, "the name of a node, or a list such as node[1-4]")
    options = re.compile(r"--[a-z][^\n]+")
    each("sbatch_options", cluster.sbatch_options, options, "an option such as --comment=llada")
    for number, option in enumerate(cluster.sbatch_options):
        name = option.lstrip("-").partition("=")[0].strip()
        if name in _OURS:
            refuse(f"sbatch_options.{number}", f"--{name} is the script's own; it depends on it")
        elif name in _KEYS:
            refuse(f"sbatch_options.{number}", f"--{name} has a key of its own; write {_KEYS[name]}: …")
    if cluster.memory_per_node is not None and not _MEMORY.fullmatch(cluster.memory_per_node):
        refuse("memory_per_node", f"{cluster.memory_per_node!r} is not a size as SLURM writes it, such as 64G; 0 = all")
    if cluster.container is not None:
        each("container.options", cluster.container.options, options, "an option of srun such as --container-writable")
        mount = re.compile(r"/[^:,\s]*(:/[^:,\s]*(:[a-z+]+)?)?")
        each("container.mounts", cluster.container.mounts, mount, "HOST:CONTAINER, two absolute paths")
