"""Cluster files to typed configurations."""

from __future__ import annotations

from pathlib import Path

from llada_megatron.launch.cluster.config import ClusterConfig
from llada_megatron.launch.cluster.validation import validate_cluster
from llada_megatron.llada_moe.config.named import Named
from llada_megatron.llada_moe.config.parsing import parse

CLUSTERS = Named("cluster", "clusters")


def load_cluster(name_or_path: str | Path) -> ClusterConfig:
    """The validated cluster in `configs/clusters/NAME.yaml` or in a YAML file (which may name one as its `base`).

    Raises:
        ConfigError: with file, line, key and what to change, one line per problem.
    """
    cluster, origins = parse(ClusterConfig, CLUSTERS.load(str(name_or_path)))
    validate_cluster(cluster, origins)
    return cluster
