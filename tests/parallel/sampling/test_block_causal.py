"""The cache of a block-causal model is exact, and costs no pass of its own."""

from __future__ import annotations

import pytest
import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.sampling.caches import BlockCausalCache, Cache, Recompute
from llada_megatron.llada_moe.sampling.loop import Method, SequenceGroup
from llada_megatron.llada_moe.sampling.schedules import Threshold
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor
from llada_megatron.llada_moe.sampling.token_buffer import Request, continuation
from tests.parallel.sampling.spread import GRID, MASK, MODELS, load, requests
from tests.ranks import run_ranks

LONG = continuation(list(range(5, 45)), 20, None, 0, GRID)
"""Its prompt fills whole blocks, so that what comes before the first step is a multiple of any piece."""


@pytest.mark.parametrize("model", ["dense", "experts", "routed by blocks"])
def test_logits_are_those_of_a_full_recomputation(model):
    for error, passes in run_ranks(compare, 1, model, requests(6, GRID))[0]:
        assert error <= 1e-5
        assert passes > 5


def compare(model: str, texts: list[Request]) -> list[tuple[float, int]]:
    """On a rank: largest relative error of the logits over all passes, and the number of passes."""
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.sampling.stage import StageRunner

    topology.initialize(LayoutConfig(), 0)
    stage = load(MODELS[model], LayoutConfig(), GRID).model
    results = []
    for together in (texts[:3], texts[3:]):
        groups, runners = [], []
        for cache in (BlockCausalCache(), Recompute()):
            method = _method(cache)
            groups.append(SequenceGroup(method, 3, 64, 8, MASK))
            runners.append(StageRunner(stage, method, 3, 64))
            for slot, request in enumerate(together):
                groups[-1].admit(slot, request)
        apart, passes = [], 0
        while (works := [group.plan() for group in groups])[0] is not None:
            outputs = [runner.forward(work) for runner, work in zip(runners, works, strict=True)]
            apart.append((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max())
            for group, runner, work, output in zip(groups, runners, works, outputs, strict=True):
                group.apply(runner.read(work, output))
            passes += 1
        assert works[1] is None
        results.append((float(torch.stack(apart).max()), passes))  # NaN if one is
    return results


@pytest.mark.parametrize(("prefill", "more"), [(8192, 0), (len(LONG.tokens), 0), (32, 1)])
def test_a_pass_for_every_step_and_at_most_one_before_them(prefill, more):
    passes, steps, positions = run_ranks(count, 1, prefill)[0]
    assert passes == steps + more
    assert positions <= 40 + passes * 2 * GRID  # the prompt once, then a block and the one before it


def count(prefill: int) -> tuple[int, int, int]:
    """On a rank: passes, steps that committed something, and positions run for the long request."""
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.sampling.generator import SequenceGenerator

    topology.initialize(LayoutConfig(), 0)
    generator = SequenceGenerator(load(MODELS["dense"], LayoutConfig(), GRID), _method(BlockCausalCache(prefill)), 1)
    steps = sum(bool(step.changed.any()) for step in generator.steps([LONG]))
    return generator.report.passes, steps, generator.report.positions_run


def _method(cache: Cache) -> Method:
    return Method(Threshold(0.5), cache, logits_processor=LogitsProcessor(excluded=[MASK]), grid=GRID)
