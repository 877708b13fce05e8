"""Whether a run fits a cluster: its layout fills whole nodes, and its files can be seen there."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.launch.cluster.resize import fits
from llada_megatron.llada_moe.errors import ConfigError

if TYPE_CHECKING:
    from llada_megatron.launch.cluster.config import ClusterConfig
    from llada_megatron.llada_moe.config.schema import RunConfig


def nodes_needed(run: RunConfig, cluster: ClusterConfig, cluster_file: str) -> int:
    """How many nodes the layout fills.

    Raises:
        ConfigError: it does not fill them evenly; with the arithmetic and the nearest layouts that do.
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
    """What works and is slow: groups that exchange activations of every layer across nodes."""
    tensor, per_node = run.layout.tensor_parallel, cluster.ranks_per_node
    if per_node % tensor and tensor > 1:
        return [
            f"layout.tensor_parallel {tensor} does not divide the {per_node} ranks of a node: its ranks speak to one "
            "another in every layer, and some of them over the network between nodes; a divisor is faster"
        ]
    return []


def check_mounts(run: RunConfig, cluster: ClusterConfig, directory: Path) -> None:
    """In a container a path must mean the same as on the host: the job's directory and the data are named so.

    `directory`: what relative paths of the run are relative to.

    Raises:
        ConfigError: names the paths that no mount of the container covers, and the mount to add.
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
