"""Where the host waits for the device in a sampling pass: once, for the statistics of its rows."""

from __future__ import annotations

import dataclasses

import pytest

from llada_megatron.llada_moe.config.layout import LayoutConfig
from tests.host_waits import HostWaits, Wait
from tests.parallel.sampling.spread import MODELS, load, requests
from tests.parallel.sampling.test_layouts import BOTH, CAUSAL, DRAWN
from tests.ranks import run_ranks


def pass_waits(cases):
    """What a process waits for while it writes three texts, and how many passes that took."""
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.sampling.generator import SequenceGenerator

    topology.initialize(LayoutConfig(), 0)
    found = {}
    for name, (model, method) in cases.items():
        loaded = load(MODELS[model], LayoutConfig(), method.grid)
        generator = SequenceGenerator(loaded, method, 3)
        with HostWaits([loaded.model]) as waits:
            for _ in generator.steps(requests(3, method.grid)):
                pass
        found[name] = waits, generator.report.passes
    return {name: (waits.waits, str(waits), passes) for name, (waits, passes) in found.items()}
