"""How busy the pipeline stages are during sampling, by the number of groups in flight."""

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
    """What is sampled, with the initial weights of a run under its layout."""

    run: RunConfig
    method: Method
    requests: Sequence[Request]
    """Every data-parallel replica samples all of them."""
    batch_size: int


def stage_reports(
    workload: Workload, groups: Sequence[int], repeats: int = 1, timeout: float = 600.0
) -> dict[int, list[GenerationReport]]:
    """Sample the same requests with each number of groups in turn, on forked processes of this machine.

    Args:
        workload: what is sampled.
        groups: numbers of groups in flight.
        repeats: rounds over all of these numbers; for each number the round with the shortest time on rank 0 counts.
        timeout: seconds after which the ranks are ended.

    Returns:
        for each number of groups, the report of each rank.
    """
    parts = run_ranks(_measure, workload.run.layout.world_size, workload, list(groups) * repeats, timeout=timeout)
    best: dict[int, list[GenerationReport]] = {}
    for number, *reports in zip(list(groups) * repeats, *parts, strict=True):
        if number not in best or reports[0].seconds < best[number][0].seconds:
            best[number] = reports
    return best


def _measure(workload: Workload, groups: Sequence[int]) -> list[GenerationReport]:
    """Runs on each rank: one report for each number of groups."""
    from llada_megatron.parallel import build, topology
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
    from llada_megatron.parallel.sampling.generator import SequenceGenerator

    topology.initialize(workload.run.layout, 0)
    loaded = LoadedModel(build.build_run_chunks(workload.run)[0].eval(), workload.run, Path(), {})
    for _ in SequenceGenerator(loaded, workload.method, workload.batch_size, max(groups)).steps(
        workload.requests[: workload.batch_size]
    ):
        pass  # the first passes allocate buffers and open connections
    reports = []
    for number in groups:
        generator = SequenceGenerator(loaded, workload.method, workload.batch_size, number)
        torch.distributed.barrier()
        for _ in generator.steps(workload.requests):
            pass
        reports.append(generator.report)
    return reports
