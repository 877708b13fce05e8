"""Where the host waits for the device in a sampling pass: once, for the statistics of its rows."""

from __future__ import annotations

import dataclasses

import pytest

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.sampling.step_cache import Credit
from tests.host_waits import HostWaits, Wait
from tests.parallel.sampling.spread import MODELS, load, requests
from tests.parallel.sampling.test_layouts import BOTH, CASES, DRAWN
from tests.ranks import run_ranks

STATISTICS = Wait("llada_megatron/llada_moe/sampling/statistics.py", "Reader.read", "cpu")
"""Which tokens are committed is decided on the host, and the next pass depends on it."""
CREDIT = Wait("llada_megatron/llada_moe/sampling/step_cache.py", "CreditAccount.raised", "nonzero")
"""How many tokens of a row ever gained credit: without it the memory of credits would grow with every step."""
EVERYTHING = dataclasses.replace(
    DRAWN, needs=frozenset({"entropy", "current", "text", "divergence", Credit(0.5, 0.9, 1.0)}), operations=(3,)
)
NAMES = ("dense guided", "dense block-causal greedy", "experts drawn", "routed by blocks")
METHODS = {name: (CASES[name].model, CASES[name].method) for name in NAMES} | {
    "all statistics": ("dense", dataclasses.replace(BOTH, logits_processor=EVERYTHING))
}


def pass_waits(cases):
    """What a process waits for while it writes two texts, and how many passes that took."""
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.sampling.generator import SequenceGenerator

    topology.initialize(LayoutConfig(), 0)
    found = {}
    for name, (model, method) in cases.items():
        loaded = load(MODELS[model], LayoutConfig(), method.grid)
        generator = SequenceGenerator(loaded, method, 2)
        with HostWaits([loaded.model]) as waits:
            for _ in generator.steps(requests(2, method.grid)):
                pass
        found[name] = waits.waits, str(waits), generator.report.passes
    return found


@pytest.fixture(scope="module")
def found():
    return run_ranks(pass_waits, 1, METHODS)[0]


@pytest.mark.parametrize("name", METHODS)
def test_a_pass_waits_for_its_statistics_and_for_nothing_else(found, name):
    waits, places, passes = found[name]
    if name == "all statistics":
        assert 0 < waits.pop(CREDIT) < passes, places  # the first pass has no earlier credit
    assert waits == {STATISTICS: passes}, places
