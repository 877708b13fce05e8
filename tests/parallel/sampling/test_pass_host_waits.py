"""Where the host waits for the device in a sampling pass: once, for the statistics of its rows."""

from __future__ import annotations

import dataclasses

import pytest

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.sampling.editors import Levenshtein, WideIn, Wino
from llada_megatron.llada_moe.sampling.schedules import SelfSpeculation
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor
from llada_megatron.llada_moe.sampling.step_cache import Credit
from llada_megatron.llada_moe.sampling.token_buffer import continuation
from tests.host_waits import HostWaits, Wait
from tests.parallel.sampling.spread import MASK, MODELS, load, requests
from tests.parallel.sampling.test_layouts import BOTH, CASES, CAUSAL, DRAWN
from tests.ranks import run_ranks

STATISTICS = Wait("llada_megatron/llada_moe/sampling/statistics.py", "Reader.read", "cpu")
"""Which tokens are committed is decided on the host, and the next pass depends on it."""
CREDIT = Wait("llada_megatron/llada_moe/sampling/step_cache.py", "CreditAccount.raised", "nonzero")
"""How many tokens of a row ever gained credit: without it the memory of credits would grow with every step."""
EXCHANGE = Wait(
    "megatron/core/transformer/moe/token_dispatcher.py",
    "MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize",
    "Event.synchronize",
)
"""How many tokens go to each rank, where experts are spread over them."""
PERMUTATION = Wait("megatron/core/transformer/moe/moe_utils.py", "permute", "masked_select")
"""Before the exchange, in 0.16 without Transformer Engine: of the tokens, and of their weights."""
EVERYTHING = dataclasses.replace(
    DRAWN, needs=frozenset({"entropy", "current", "text", "divergence", Credit(0.5, 0.9, 1.0)}), operations=(3,)
)
WINO = dataclasses.replace(
    CAUSAL,
    schedule=WideIn(0.1, least=2, most=4),
    editor=Wino(0.5),
    logits_processor=LogitsProcessor(Wino.needs, [MASK]),
)
LEVENSHTEIN = dataclasses.replace(
    CAUSAL,
    editor=(editor := Levenshtein(0.0, 4, 6, 7)),
    logits_processor=LogitsProcessor(frozenset(editor.needs), [MASK], editor.operations),
)
NAMES = ("dense guided", "dense block-causal greedy", "experts drawn", "routed by blocks")
METHODS = {name: (CASES[name].model, CASES[name].method) for name in NAMES} | {
    "all statistics": ("dense", dataclasses.replace(BOTH, logits_processor=EVERYTHING)),
    "wino": ("dense", WINO),
    "levenshtein": ("dense", LEVENSHTEIN),
    "self-speculation": ("dense", dataclasses.replace(CAUSAL, schedule=SelfSpeculation(4), grid=None)),
}


def pass_waits(cases, layout):
    """What a process waits for while it writes two texts, and how many passes that took."""
    from llada_megatron.parallel import topology
    from llada_megatron.parallel.sampling.generator import SequenceGenerator

    topology.initialize(layout, 0)
    found = {}
    for name, (model, method) in cases.items():
        speculative = isinstance(method.schedule, SelfSpeculation)
        texts = [continuation(range(5), 9, None, stream) for stream in range(2)]
        loaded = load(MODELS[model], layout, method.grid, causal=speculative)
        with HostWaits([loaded.model]) as waits:
            generator = SequenceGenerator(loaded, method, 2)
            for _ in generator.steps(texts if speculative else requests(2, method.grid)):
                pass
        found[name] = waits.waits, str(waits), generator.report.passes
    return found


@pytest.fixture(scope="module")
def found():
    return run_ranks(pass_waits, 1, METHODS, LayoutConfig())[0]


@pytest.mark.parametrize("name", METHODS)
def test_a_pass_waits_for_its_statistics_and_for_nothing_else(found, name):
    waits, places, passes = found[name]
    if name == "all statistics":
        assert 0 < waits.pop(CREDIT) < passes, places  # the first pass has no earlier credit
    assert waits == {STATISTICS: passes}, places


def test_where_experts_are_spread_a_pass_waits_for_their_exchange_in_every_layer():
    cases = {"spread": ("experts", CASES["experts drawn"].method)}
    for rank in run_ranks(pass_waits, 2, cases, LayoutConfig(tensor_parallel=2, expert_parallel=2)):
        waits, places, passes = rank["spread"]
        layers = passes * MODELS["experts"].num_layers
        assert waits.pop(PERMUTATION, 2 * layers) == 2 * layers, places
        assert waits == {STATISTICS: passes, EXCHANGE: layers}, places
