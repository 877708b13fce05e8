"""Whether a run fits a cluster: the layout fills whole nodes, the partition has enough, containers see the files."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.launch.cluster import slurm
from llada_megatron.launch.cluster.notation import seconds
from llada_megatron.llada_moe.config import validate_run
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.planning.gpu_sheet import load_gpu
from llada_megatron.parallel.fp8.recipes import require_sheet

if TYPE_CHECKING:
    from llada_megatron.launch.cluster.config import ClusterConfig
    from llada_megatron.llada_moe.config.run import RunConfig


def resized(run: RunConfig, ranks: int) -> RunConfig:
    """`run` with the data_parallel that makes its layout one of `ranks` ranks.

    Raises:
        ConfigError: there is no such layout, or the batch or the experts do not fit it.
    """
    rest = run.layout.world_size // run.layout.data_parallel
    if ranks < rest or ranks % rest:
        raise ConfigError(f"layout: tensor x pipeline x context = {rest} ranks do not divide {ranks}")
    changed = replace(run, layout=replace(run.layout, data_parallel=ranks // rest))
    validate_run(changed)
    return changed


def node_counts(run: RunConfig, ranks_per_node: int, nodes: int) -> list[int]:
    """The numbers of nodes, up to `nodes`, on which the run can go on; ascending."""
    return [count for count in range(1, nodes + 1) if fits(run, count * ranks_per_node)]


def fits(run: RunConfig, ranks: int) -> bool:
    """Whether the run can go on with `ranks` ranks, as `resized` changes it."""
    try:
        resized(run, ranks)
    except ConfigError:
        return False
    return True


@dataclass(frozen=True)
class Partition:
    """Limits of a partition."""

    name: str
    nodes: int
    """The number of all its nodes, including those that are down."""
    time: str
    """The longest allocation, as SLURM writes it; it may be `infinite`."""


def check_partition(cluster: ClusterConfig, nodes: int, cluster_file: str) -> list[str]:
    """Check the number of nodes; returns a warning where the time is above the partition's limit (some accounts may
    exceed it).

    Raises:
        ConfigError: no partition that the job may run in has so many nodes.
        ResourceError: SLURM cannot be asked.
    """
    wanted = cluster.partition.split(",") if cluster.partition else []
    every, default = _partitions()
    usable = [each for each in every if each.name in (wanted or default)]
    if not usable:  # a partition that does not exist: SLURM will refuse it
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
            "your account may not exceed that, the job will wait for ever (PartitionTimeLimit)"
        ]
    return []


def _partitions() -> tuple[list[Partition], list[str]]:
    """All partitions, and the names of the default ones."""
    rows = [line.split("|") for line in slurm.partitions().splitlines()]
    found = [(Partition(row[1], int(row[2]), row[3]), row[0].endswith("*")) for row in rows if len(row) == 4]
    return [each for each, _ in found], [each.name for each, is_default in found if is_default]


def nodes_needed(run: RunConfig, cluster: ClusterConfig, cluster_file: str) -> int:
    """The number of nodes that the layout fills.

    Raises:
        ConfigError: the layout does not fill whole nodes; with the arithmetic and the nearest layouts that do.
    """
    layout, per_node = run.layout, cluster.ranks_per_node
    whole, rest = divmod(layout.world_size, per_node)
    if not rest:
        return whole
    raise ConfigError(
        f"layout: tensor_parallel {layout.tensor_parallel} x pipeline_parallel {layout.pipeline_parallel} x "
        f"context_parallel {layout.context_parallel} x data_parallel {layout.data_parallel} = {layout.world_size} "
        f"ranks, but a node of {cluster_file} has {per_node} (ranks_per_node): {layout.world_size} = {whole} x "
        f"{per_node} + {rest}; {_suggestion(run, per_node)}"
    )


def layout_warnings(run: RunConfig, cluster: ClusterConfig) -> list[str]:
    """Warnings of layouts that work but are slow: groups that exchange the activations of every layer across nodes."""
    tensor, per_node = run.layout.tensor_parallel, cluster.ranks_per_node
    if per_node % tensor and tensor > 1:
        return [
            f"layout.tensor_parallel {tensor} does not divide the {per_node} ranks of a node: its ranks exchange "
            "activations in every layer, and some of them over the network between nodes; a divisor is faster"
        ]
    return []


def check_fp8(run: RunConfig, cluster: ClusterConfig, cluster_file: str) -> None:
    """Refuse FP8 that the GPUs of the cluster cannot run. Of GPUs whose kind the file does not name nothing is known.

    Raises:
        ConfigError: there are no GPUs, or they have no FP8, or not that recipe.
    """
    fp8 = run.training.fp8
    if fp8 is None:
        return
    if not cluster.gpus:
        raise ConfigError(
            f"training.fp8.recipe: {fp8.recipe} needs GPUs with FP8, and nodes of {cluster_file} have none "
            "(gpus_per_node); remove training.fp8, or name another cluster"
        )
    if cluster.gpu:
        require_sheet(fp8, load_gpu(cluster.gpu), f"gpu of {cluster_file}")


def check_mounts(run: RunConfig, cluster: ClusterConfig, directory: Path) -> None:
    """Check that the container has the run's files at the same paths as the host: the job names them by these paths.

    Args:
        directory: the folder that relative paths of the run start from.

    Raises:
        ConfigError: with the paths that no mount of the container covers, and the mount to add.
    """
    if cluster.container is None:
        return
    pairs = [mount.split(":") for mount in cluster.container.mounts]
    same = [Path(pair[0]) for pair in pairs if pair[0] == (pair + pair)[1]]
    needed = [run.output_dir, *(prepared.path for prepared in run.data.sets), str(directory)]
    needed += [path for path in (run.checkpoint.load, run.checkpoint.copy_to) if path]
    wrong = [path for path in needed if not any((directory / path).is_relative_to(mount) for mount in same)]
    if wrong:
        folder = directory / wrong[0]
        raise ConfigError(
            f"container.mounts: {', '.join(dict.fromkeys(wrong))} cannot be seen in the container under the same path; "
            f"add a mount such as {folder}:{folder}"
        )


def _suggestion(run: RunConfig, per_node: int) -> str:
    """The nearest values of data_parallel below and above that fill whole nodes and that the run allows."""
    model_ranks = run.layout.world_size // run.layout.data_parallel
    unit = per_node // math.gcd(per_node, model_ranks)
    start = run.layout.data_parallel // unit
    below = next((unit * n for n in range(start, 0, -1) if fits(run, unit * n * model_ranks)), None)
    above = next((unit * n for n in range(start + 1, 4 * start + 5) if fits(run, unit * n * model_ranks)), None)
    usable = [
        f"layout.data_parallel={size} ({count_of_nodes(size * model_ranks // per_node)})"
        for size in (below, above)
        if size
    ]
    if usable:
        return "use " + " or ".join(usable)
    batch = run.training.global_batch_size
    return (
        "change ranks_per_node, or the axes of the layout and training.micro_batch_size "
        f"({run.training.micro_batch_size}), which times data_parallel must divide global_batch_size {batch}"
    )


def count_of_nodes(number: int) -> str:
    """`1 node`, `8 nodes`."""
    return "1 node" if number == 1 else f"{number} nodes"
