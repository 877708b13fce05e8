"""With as many groups as stages, the stages of a pipeline work at the same time."""

from __future__ import annotations

import time

import pytest
import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.sampling.loop import Method
from llada_megatron.llada_moe.sampling.schedules import FixedSteps
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor
from llada_megatron.llada_moe.sampling.token_buffer import continuation
from llada_megatron.tools.bench.layouts import parity_run
from llada_megatron.tools.bench.sampling.utilization import Workload, stage_reports
from tests.parallel.sampling.spread import MASK, MODELS, load
from tests.ranks import run_ranks

STAGE_SECONDS = 0.15
METHOD = Method(FixedSteps(4), logits_processor=LogitsProcessor(excluded=[MASK]))
REQUESTS = [continuation([1, 2, 3], 8, 8, stream) for stream in range(8)]


@pytest.mark.alone
def test_two_groups_keep_two_stages_busy():
    one, two = (run_ranks(busy_share, 2, groups) for groups in (1, 2))
    assert max(one) < 0.55
    assert min(two) > 1.3 * max(one)


def busy_share(groups: int) -> float:
    """On a rank: the share of the time in which its stage works, of two stages that take much longer than messages."""
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.sampling import generator as module
    from llada_megatron.parallel.sampling.stage import StageRunner

    class SlowRunner(StageRunner):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            time.sleep(STAGE_SECONDS)
            return super().forward(*args)

    layout = LayoutConfig(pipeline_parallel=2)
    topology.initialize(layout, 0)
    loaded = load(MODELS["dense"], layout, None)
    for runner, requests in (
        (StageRunner, REQUESTS),
        (SlowRunner, REQUESTS[:4]),
    ):  # the first passes of a process are slow
        module.StageRunner = runner
        generator = module.SequenceGenerator(loaded, METHOD, 2, groups)
        assert len([done for step in generator.steps(requests) for done in step.finished]) == len(requests)
        torch.distributed.barrier()
    return generator.report.busy_share


def test_a_report_for_every_number_of_groups_and_stage():
    run = parity_run(MODELS["dense"], LayoutConfig(pipeline_parallel=2))
    reports = stage_reports(Workload(run, METHOD, REQUESTS, 2), [1, 2, 3], repeats=2, timeout=60.0)
    assert sorted(reports) == [1, 2, 3]
    for stages in reports.values():
        assert len(stages) == 2
        assert all(0 < stage.busy_seconds < stage.seconds for stage in stages)
        assert stages[0].positions_run == stages[1].positions_run == 4 * 8 * 11
