"""Whether a partition can ever run a job: SLURM queues one that asks for more, and it waits for good."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llada_megatron.launch.cluster import slurm
from llada_megatron.launch.cluster.validation import seconds
from llada_megatron.llada_moe.errors import ConfigError

if TYPE_CHECKING:
    from llada_megatron.launch.cluster.config import ClusterConfig


@dataclass(frozen=True)
class Partition:
    """Limits of a partition."""

    name: str
    nodes: int
    """All of them, also those that are down."""
    time: str
    """Longest allocation, as SLURM writes it; `infinite`."""


def check_partition(cluster: ClusterConfig, nodes: int, cluster_file: str) -> list[str]:
    """What to warn of: a time limit above the partition's (some accounts may exceed it).

    Raises:
        ConfigError: no partition that the job may run in has so many nodes.
        ResourceError: SLURM cannot be asked.
    """
    wanted = cluster.partition.split(",") if cluster.partition else []
    every, default = _partitions()
    usable = [each for each in every if each.name in (wanted or default)]
    if not usable:  # a partition that does not exist is SLURM's to refuse
        return []
    largest = max(usable, key=lambda each: each.nodes)
    if nodes > largest.nodes:
        raise ConfigError(
            f"{cluster_file}: the layout fills {nodes} nodes, but partition {largest.name} has {largest.nodes}; lower "
            f"layout.data_parallel, or name another partition ({', '.join(each.name for each in every)})"
        )
    limit, asked = seconds(largest.time), seconds(cluster.time)
    if limit is not None and asked is not None and asked > limit:
        return [
            f"{cluster_file}: time {cluster.time} is more than the {largest.time} that {largest.name} allows: where "
            "your account may not exceed that, the job waits for good (PartitionTimeLimit)"
        ]
    return []


def _partitions() -> tuple[list[Partition], list[str]]:
    """All partitions, and the names of the default ones."""
    rows = [line.split("|") for line in slurm.partitions().splitlines()]
    found = [(Partition(row[1], int(row[2]), row[3]), row[0].endswith("*")) for row in rows if len(row) == 4]
    return [each for each, _ in found], [each.name for each, is_default in found if is_default]
