"""The goals of the GPU: met, missed, and not measured, which never counts as met."""

from __future__ import annotations

import math

import pytest

from llada_megatron.tools.bench.gpu.goals import claims
from llada_megatron.tools.bench.gpu.measured_machine import Machine
from llada_megatron.tools.bench.gpu.parts import BY_NAME
from llada_megatron.tools.bench.gpu.results_file import Measurement, ResultsFile

H100 = Machine("NVIDIA H100 80GB HBM3", 85 * 10**9, 90, "2.11.0")


@pytest.fixture
def judged(tmp_path):
    def judge(part, **figures):
        results = ResultsFile(tmp_path / "bench.jsonl")
        results.open_for(H100)
        for name, value in figures.items():
            failed = isinstance(value, str)
            results.add(Measurement(part, name, {} if failed else value, 1.0, value if failed else None))
        results.end(part, "done")
        found = [claim for claim in claims(results, H100, [BY_NAME[part]]) if claim.holds is not None]
        return {claim.claim: (claim.value, claim.holds) for claim in found}

    return judge


def step(ceiling, speed=100.0):
    return {"of_measured_ceiling": ceiling, "tokens_per_second": speed, "peak_memory_gb": 50.0, "layers": 5}


def test_utilisation_with_one_and_forty_documents_and_the_fastest_recipe(judged):
    one, forty = "1 document a window", "40 documents a window"
    found = judged(
        "moe", **{f"bf16, {one}": step(0.41), f"bf16, {forty}": step(0.35), f"bf16, 8{forty[2:]}": step(0.1)}
    )
    assert list(found.values()) == [(0.41, True), (0.35, False)]
    assert next(iter(found)) == f"moe: bf16, {one}: model FLOPs of the measured ceiling (5 layers)"
    recipes = {f"FP8 delayed, {one}": step(0.2, 110.0), f"FP8 blockwise, {one}": step(0.25, 120.0)}
    found = judged("moe-rank", **{f"bf16, {one}": step(0.41)}, **recipes)
    assert list(found.values()) == [(1.2, True)] and "FP8 blockwise, the fastest" in next(iter(found))


def test_what_failed_or_was_not_run_misses_its_goal_with_the_reason(judged):
    found = judged("llada-8b", **{"bf16, 1 document a window": "out of memory: lower it"})
    (first, missed), (second, unmeasured) = found.items()
    assert first == "llada-8b: bf16, 1 document a window: out of memory: lower it"
    assert math.isnan(missed[0]) and missed[1] is False
    assert "no recipe was measured" in second and unmeasured[1] is False
    assert [holds for _, holds in judged("exact-local").values()] == [False] * 3
    assert [holds for _, holds in judged("sampler").values()] == []


@pytest.mark.parametrize(("error", "holds"), [(9e-6, True), (2e-5, False), (math.inf, False)])
def test_the_worst_case_counts(judged, error, holds):
    good = {"worst": 1e-7, "first_ten": 1e-7, "where": "loss"}
    found = judged(
        "exact-local", **{"a, fp32": good, "b, fp32": {"worst": error, "where": "embedding"}, "demo's model": good}
    )
    (text, verdict), *demo = found.items()
    assert [holds for _, (_, holds) in demo] == [True, True]
    assert verdict == (error, holds) and "2 cases (worst: b, fp32, embedding)" in text


def test_loss_in_fp8_attention_loss_memory_and_graphs(judged):
    found = judged("fp8-loss", bf16={"last": 2.0}, **{"FP8 delayed": {"last": 2.009}, "FP8 tensorwise": {"last": 1.98}})
    assert [holds for _, holds in found.values()] == [True, False]
    short = {"times_as_fast": 6.0, "peak_gb": 1.0, "difference": 1e-3}
    found = judged(
        "attention",
        **{"block-causal, 4096 positions": short, "block-causal, 16384 positions": {**short, "peak_gb": 16.0}},
    )
    assert list(found.values()) == [(6.0, True), (16.0, False)]
    assert list(judged("loss", vocabulary={"memory": 0.14}).values()) == [(0.14, True)]
    batch = {"passes_per_second": 40.0}
    found = judged("sampler", **{"batch 1, without graphs": batch, "batch 1, with graphs": {"passes_per_second": 80.0}})
    assert list(found.values()) == [(2.0, True)]


def test_a_part_that_is_not_done_is_a_failure_with_and_without_goals(tmp_path):
    for machine in (H100, Machine("a CPU", 0, 0, "2.11.0")):
        results = ResultsFile(tmp_path / f"{machine.capability}.jsonl")
        results.open_for(machine)
        results.add(Measurement("checkpoint", "save and load", {"gb": 1.0}, 1.0))
        results.end("checkpoint", "cut", "its time was over after 25 s")
        *figures, cut, left = claims(results, machine, [BY_NAME["checkpoint"], BY_NAME["profile"]])
        assert [claim.holds for claim in figures] == [None]
        assert cut.holds is left.holds is False
        assert cut.claim == "checkpoint: cut: its time was over after 25 s"
        assert left.claim.startswith("profile: not run")
