"""The goals of the GPU: met, missed, and not measured, which never counts as met."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from llada_megatron.tools.bench.gpu import agreement
from llada_megatron.tools.bench.gpu.goals import claims
from llada_megatron.tools.bench.gpu.measured_machine import Machine
from llada_megatron.tools.bench.gpu.parts import BY_NAME
from llada_megatron.tools.bench.gpu.results_file import Measurement, ResultsFile

H100 = Machine("NVIDIA H100 80GB HBM3", 85 * 10**9, 90, "2.11.0")


@pytest.fixture
def judged(tmp_path):
    def judge(part, expected=(), **figures):
        results = ResultsFile(tmp_path / "bench.jsonl")
        results.open_for(H100)
        for name, value in figures.items():
            failed = isinstance(value, str)
            results.add(Measurement(part, name, {} if failed else value, 1.0, value if failed else None))
        results.expect(part, expected)
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
    for part, goals in (("exact", 5), ("sampler", 2), ("fp8-loss", 2), ("attention", 1), ("loss", 1), ("moe", 2)):
        assert [math.isnan(value) and not holds for value, holds in judged(part).values()] == [True] * goals
    assert [holds for _, holds in judged("moe", **{"bf16, 8 documents a window": step(0.9)}).values()] == [False] * 2


@pytest.mark.parametrize(("error", "holds"), [(9e-6, True), (2e-5, False), (math.inf, False), (math.nan, False)])
@pytest.mark.parametrize("first", [True, False])
def test_the_worst_case_counts(judged, error, holds, first):
    good, bad = {"worst": 1e-7, "first_ten": 1e-7, "where": "loss"}, {"worst": error, "where": "embedding"}
    cases = {"b, fp32": bad, "a, fp32": good} if first else {"a, fp32": good, "b, fp32": bad}
    found = judged("exact-local", **cases, **{"demo's model": good})
    (text, verdict), *others = found.items()
    assert [holds for _, (_, holds) in others] == [False, False, True, True]  # no case in bf16
    assert verdict == pytest.approx((error, holds), nan_ok=True) and "2 cases (worst: b, fp32, embedding)" in text


def test_cases_that_were_not_reached_are_no_agreement(judged):
    good = {"worst": 1e-7, "loss": 1e-7, "all_gradients": 1e-7, "where": "loss"}
    found = judged("exact", ["a, fp32", "b, fp32", "a, bf16", "demo's model"], **{"a, fp32": good, "a, bf16": good})
    assert [holds for _, holds in found.values()] == [False, True, True, False, False]
    assert "1 of 2 cases were not reached; of the others at most 1e-07, a, fp32, loss)" in next(iter(found))


def test_a_loss_that_is_no_number_is_not_passed_over(monkeypatch):
    part = SimpleNamespace(toy=True, results=SimpleNamespace(read=lambda: SimpleNamespace(figure=lambda *_: [2.0] * 3)))
    monkeypatch.setattr(agreement, "demo_losses", lambda toy: [2.0, math.nan, 2.0])
    found = agreement.demo_difference(part)
    assert math.isnan(found["worst"]) and math.isnan(found["first_ten"])


def test_loss_in_fp8_attention_loss_memory_and_graphs(judged):
    bf16 = {"last": 2.0, "of_loss_without_context": 0.5}
    found = judged("fp8-loss", bf16=bf16, **{"FP8 delayed": {"last": 2.009}, "FP8 tensorwise": {"last": 1.98}})
    assert [holds for _, holds in found.values()] == [True, True, False]
    found = judged("fp8-loss", bf16={**bf16, "of_loss_without_context": 0.99}, **{"FP8 blockwise": {"last": 2.0}})
    assert next(iter(found.values())) == (0.99, False)
    short = {"times_as_fast": 6.0, "peak_gb": 1.0, "difference": 1e-3, "gradient_difference": 2e-3}
    long = {**short, "peak_gb": 16.0, "gradient_difference": 0.9}
    found = judged("attention", **{"block-causal, 4096 positions": short, "block-causal, 16384 positions": long})
    assert [holds for _, holds in found.values()] == [True, True, True, True, False, False]
    found = judged("loss", vocabulary={"memory": 0.14, "difference": 1e-5}, broken={"memory": 0.1, "difference": 0.5})
    assert [holds for _, holds in found.values()] == [True, True, True, False]
    batch = {"passes_per_second": 40.0}
    for same in (1.0, 0.98):
        graphs = {"passes_per_second": 80.0, "same_tokens": same}
        found = judged("sampler", **{"batch 1, without graphs": batch, "batch 1, with graphs": graphs})
        assert list(found.values()) == [(2.0, True), (same, same == 1.0)]


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
