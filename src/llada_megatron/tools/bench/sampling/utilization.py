"""How busy the pipeline stages are while sequences are written, by the number of groups in flight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.sampling.loop import Method
from llada_megatron.llada_moe.sampling.token_buffer import Request
from llada_megatron.parallel.ranks import run_ranks
from llada_megatron.parallel.sampling.stage import GenerationReport


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is written, with the initial weights of a run under its layout."""

    run: RunConfig
    method: Method
    drafts: Sequence[Request]
    """Every data-parallel replica writes all of them."""
    batch_size: int


def stage_reports(
    load: Workload, groups: Sequence[int], repeats: int = 1, timeout: float = 600.0
) -> dict[int, list[GenerationReport]]:
    """Write the same drafts with each number of groups in turn, on forked processes of this machine.

    Args:
        load: what is written.
        groups: numbers of groups in flight.
        repeats: rounds over all of them, of which the one with the shortest time on rank 0 counts.
        timeout: seconds after which the ranks are ended.

    Returns:
        By the number of groups the report of each rank.
    """
    parts = run_ranks(_measure, load.run.layout.world_size, load, list(groups) * repeats, timeout=timeout)
    best: dict[int, list[GenerationReport]] = {}
    for number, *reports in zip(list(groups) * repeats, *parts, strict=True):
        if number not in best or reports[0].seconds < best[number][0].seconds:
            best[number] = reports
    return best


def _measure(load: Workload, groups: Sequence[int]) -> list[GenerationReport]:
    """On a rank: one report for each number of groups."""
    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
    from llada_megatron.parallel.sampling.generator import SequenceGenerator

    topology.initialize(load.run.layout, 0)
    loaded = LoadedModel(build.build_run_chunks(load.run)[0].eval(), load.run, Path(), {})
    for _ in SequenceGenerator(loaded, load.method, load.batch_size, max(groups)).steps(load.drafts[: load.batch_size]):
        pass  # the first passes make buffers and connections
    reports = []
    for number in groups:
        writer = SequenceGenerator(loaded, load.method, load.batch_size, number)
        torch.distributed.barrier()
        for _ in writer.steps(load.drafts):
            pass
        reports.append(writer.report)
    return reports
