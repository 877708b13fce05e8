"""The same run on another number of ranks: only data_parallel changes."""

from __future__ import annotations

from dataclasses import replace

from llada_megatron.llada_moe.config import validate_run
from llada_megatron.llada_moe.config.schema import RunConfig
from llada_megatron.llada_moe.errors import ConfigError


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
    """Whether the run can go on with `ranks` ranks (see `resized`)."""
    try:
        resized(run, ranks)
    except ConfigError:
        return False
    return True
