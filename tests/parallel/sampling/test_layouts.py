"""Every layout writes what one process writes, and a batch what each sequence alone becomes."""

from __future__ import annotations

import dataclasses
import functools

import hypothesis
import pytest
from hypothesis import strategies

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.sampling.caches import BlockCausalCache, DualCache, NoCache, PrefixCache, Recompute
from llada_megatron.llada_moe.sampling.editors import NoEditor, TokenEditing, Wino
from llada_megatron.llada_moe.sampling.loop import Finished, Method
from llada_megatron.llada_moe.sampling.schedules import (
    CreditThreshold,
    EntropyBound,
    Factor,
    FixedSteps,
    Hierarchical,
    SlowFast,
    Stable,
    Threshold,
)
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor
from tests.parallel.sampling.spread import EOS, GRID, MASK, Case, Written, requests, write_on_ranks
from tests.ranks import RankFailure

LAYOUTS = {
    "TP2": {"tensor_parallel": 2},
    "PP2": {"pipeline_parallel": 2},
    "TP2.PP2": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "EP2": {"data_parallel": 2, "expert_parallel": 2},
    "EP2.PP2": {"data_parallel": 2, "expert_parallel": 2, "pipeline_parallel": 2},
    "TP2.EP2": {"tensor_parallel": 2, "expert_parallel": 2},
    "EP2.ETP2": {"tensor_parallel": 2, "data_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 2},
    "DP2": {"data_parallel": 2},
}
GREEDY = LogitsProcessor(excluded=[MASK])
DRAWN = LogitsProcessor(excluded=[MASK], temperature=1.0, seed=3)
BOTH = Method(Threshold(0.5), NoCache(), logits_processor=GREEDY, stop_id=EOS)
"""For bidirectional models."""
CAUSAL = Method(Threshold(0.5), BlockCausalCache(prefill=GRID), logits_processor=GREEDY, stop_id=EOS, grid=GRID)


def _cases() -> dict[str, Case]:
    methods = {
        "greedy": BOTH,
        "drawn": dataclasses.replace(BOTH, cache=DualCache(), logits_processor=DRAWN),
        "guided": dataclasses.replace(
            BOTH, schedule=FixedSteps(8), cache=PrefixCache(), logits_processor=dataclasses.replace(DRAWN, guidance=0.5)
        ),
        "block-causal greedy": CAUSAL,
        "block-causal drawn": dataclasses.replace(CAUSAL, logits_processor=DRAWN),
    }
    cases = {}
    for model in ("dense", "experts"):
        for name, method in methods.items():
            cases[f"{model} {name}"] = Case(model, method, requests(6, method.grid))
    cases["routed by blocks"] = Case("routed by blocks", CAUSAL, requests(6, GRID))
    cases["few"] = Case("experts", BOTH, requests(1, None))
    return cases


CASES = _cases()
SMALL = ("dense drawn", "dense block-causal greedy")
"""What layouts that differ little from others are tested with."""


def chosen(layout: str) -> dict[str, Case]:
    """The cases that a layout is tested with."""
    sizes = LAYOUTS[layout]
    if "expert_parallel" in sizes:
        return {name: case for name, case in CASES.items() if case.model != "dense"}
    return {name: CASES[name] for name in SMALL} if layout == "DP2" else CASES


@functools.cache
def one_process() -> dict[str, dict[int, Finished]]:
    results = write_on_ranks(list(CASES.values()), LayoutConfig())
    return {name: finished for name, (finished, _) in zip(CASES, results, strict=True)}


@functools.cache
def spread(layout: str) -> dict[str, tuple[dict[int, Finished], list[Written]]]:
    cases = chosen(layout)
    results = write_on_ranks(list(cases.values()), LayoutConfig(**LAYOUTS[layout]))
    return dict(zip(cases, results, strict=True))


@pytest.mark.parametrize(("layout", "name"), [(layout, name) for layout in LAYOUTS for name in chosen(layout)])
def test_a_layout_writes_what_one_process_writes(layout, name):
    finished, ranks = spread(layout)[name]
    assert finished == one_process()[name]
    assert len(finished) == len(CASES[name].requests)
    assert all(rank.report.bytes_per_row <= 64 for rank in ranks)
    assert all(rank.unchanged for rank in ranks)


def test_replicas_with_less_to_write_take_part_while_others_need_their_experts():
    for layout in ("EP2", "EP2.PP2"):
        for _, ranks in spread(layout).values():
            totals = [rank.report.passes + rank.report.idle_passes for rank in ranks]
            assert len(set(totals)) == 1
            assert max(rank.report.idle_passes for rank in ranks) > 0
    assert all(rank.report.idle_passes == 0 for _, ranks in spread("TP2.EP2").values() for rank in ranks)
    assert all(rank.report.idle_passes == 0 for _, ranks in spread("DP2").values() for rank in ranks)


def test_any_number_of_groups_writes_the_same():
    sizes = [(groups, batch) for groups in (1, 2, 3, 8) for batch in (1, 4)]
    cases = [dataclasses.replace(CASES["dense drawn"], groups=groups, batch_size=batch) for groups, batch in sizes]
    for finished, _ in write_on_ranks(cases, LayoutConfig(**LAYOUTS["PP2"])):
        assert finished == one_process()["dense drawn"]


def test_uneven_stages_write_the_same():
    layout = LayoutConfig(pipeline_parallel=2, pipeline_layers=[2, 1])
    case = Case("three layers", CAUSAL, requests(4, GRID))
    assert write_on_ranks([case], layout)[0][0] == write_on_ranks([case], LayoutConfig())[0][0]


def test_statistics_go_round_more_than_two_stages():
    cases = [Case("three layers", CAUSAL, requests(6, GRID), groups=groups) for groups in (1, 3)]
    (expected, _), _ = write_on_ranks(cases, LayoutConfig())
    for finished, ranks in write_on_ranks(cases, LayoutConfig(pipeline_parallel=3)):
        assert finished == expected
        assert [rank.report.bytes_per_row for rank in ranks] == [8, 0, 20]  # token and confidence, and the packet


@pytest.mark.parametrize(
    "axes",
    [
        {"context_parallel": 2},
        {"tensor_parallel": 2, "sequence_parallel": True},
        {"data_parallel": 2, "expert_parallel": 2, "expert_dispatcher": "allgather"},
    ],
    ids=str,
)
def test_layouts_that_sampling_does_not_run_under_are_refused(axes):
    with pytest.raises(RankFailure, match="sampling does not run under layout"):
        write_on_ranks([CASES["few"]], LayoutConfig(**axes))


@strategies.composite
def drawn_cases(draw) -> tuple[LayoutConfig, Case]:
    """Everything that must not matter, and a method to which it must not."""
    layout = draw(strategies.sampled_from(sorted(LAYOUTS)))
    grid = draw(strategies.sampled_from([None, GRID]))
    steps = strategies.builds(FixedSteps, strategies.integers(1, 24))
    schedules = [
        steps,
        strategies.builds(Threshold, strategies.floats(0.3, 0.95)),
        strategies.builds(Factor, strategies.floats(0.3, 3.0)),
        strategies.builds(EntropyBound, strategies.floats(0.05, 2.0)),
        strategies.just(Hierarchical()),
        strategies.just(CreditThreshold()),
        strategies.just(Stable(threshold=0.3, divergence=1.0)),
        strategies.just(SlowFast(exploration=2)),
    ]
    both_ways = [
        strategies.just(NoCache()),
        strategies.builds(PrefixCache, strategies.sampled_from([None, 3])),
        strategies.builds(DualCache, *[strategies.integers(0, 3)] * 3, strategies.sampled_from([None, 3])),
    ]
    causal = [strategies.just(Recompute()), strategies.builds(BlockCausalCache, strategies.sampled_from([GRID, 64]))]
    method = Method(
        schedule=draw(strategies.one_of(schedules)),
        cache=draw(strategies.one_of(causal if grid else both_ways)),
        editor=draw(strategies.sampled_from([NoEditor(), NoEditor(), TokenEditing(0.6, 4), Wino(0.5)])),
        logits_processor=draw(strategies.sampled_from([GREEDY, DRAWN])),
        stop_id=draw(strategies.sampled_from([None, EOS])),
        grid=grid,
    )
    model = draw(strategies.sampled_from(["dense", "experts"]))
    case = Case(
        "experts" if LAYOUTS[layout].get("expert_parallel") else model,
        method,
        requests(draw(strategies.integers(1, 7)), grid, draw(strategies.integers(0, 99))),
        batch_size=draw(strategies.integers(1, 4)),
        groups=draw(strategies.sampled_from([None, 1, 2, 3])),
    )
    return LayoutConfig(**LAYOUTS[layout]), case


@hypothesis.settings(max_examples=6, phases=[hypothesis.Phase.generate])  # an example takes seconds
@hypothesis.given(drawn_cases())
def test_any_layout_and_batch_write_what_each_sequence_alone_becomes(drawn):
    layout, case = drawn
    alone = [dataclasses.replace(case, requests=[request], batch_size=1, groups=1) for request in case.requests]
    expected = {k: v for finished, _ in write_on_ranks(alone, LayoutConfig()) for k, v in finished.items()}
    ((finished, ranks),) = write_on_ranks([case], layout)
    assert finished == expected
    assert all(rank.report.bytes_per_row <= 64 for rank in ranks)
