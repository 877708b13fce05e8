"""A measurement that fails costs itself; a broken GPU ends the process; a late part is cut. Figures are made once."""

from __future__ import annotations

import math
import time
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.tools.bench.gpu import part_run, step_speed
from llada_megatron.tools.bench.gpu.measured_machine import Machine
from llada_megatron.tools.bench.gpu.part_run import BrokenContextError, run_part
from llada_megatron.tools.bench.gpu.parts import AS_TRAINED
from llada_megatron.tools.bench.gpu.results_file import ResultsFile

HERE = Machine("a CPU", 0, 0, "2.11.0")


@pytest.fixture
def run(tmp_path):
    results = ResultsFile(tmp_path / "bench.jsonl")
    results.open_for(HERE)

    def once(function, seconds=60):
        part = SimpleNamespace(name="part", process=AS_TRAINED, seconds=seconds, load=lambda: function)
        run_part(part, results, HERE, time.monotonic() + 1000)
        known = results.read()
        return {each.name: each for each in known.of("part")}, known.ends["part"]

    return once


def fails(error):
    raise error


def test_the_others_are_measured_and_the_failure_is_in_one_line(run):
    def part(context):
        context.measure("first", fails, ValueError("two\nlines"))
        context.measure("second", fails, ResourceError("out of memory: lower it"))
        context.measure("third", lambda: {"x": 1.0})

    found, (status, detail) = run(part)
    assert found["first"].error.startswith("ValueError: two lines (test_part_run.py:")
    assert found["second"].error == "out of memory: lower it"
    assert found["third"].figures == {"x": 1.0} and found["third"].error is None
    assert status == "failed" and detail == "no figures: first, second"


def test_a_known_figure_is_returned_and_not_measured_again_but_a_failed_one_is(run):
    run(lambda context: (context.measure("good", lambda: {"x": 1.0}), context.measure("bad", fails, ValueError("no"))))
    calls = []

    def part(context):
        assert context.missing(["good", "bad"]) == ["bad"]
        assert context.measure("good", calls.append) == {"x": 1.0}
        context.measure("bad", lambda: {"x": 2.0})

    found, (status, _) = run(part)
    assert calls == [] and found["bad"].figures == {"x": 2.0} and status == "done"


def test_a_figure_that_is_no_number_is_measured_again(run):
    _, (status, detail) = run(lambda context: context.measure("late", lambda: {"seconds": math.nan, "where": "here"}))
    assert status == "failed" and detail == "no figures: late"
    found, (status, _) = run(lambda context: context.measure("late", lambda: {"seconds": 1.0}))
    assert found["late"].figures == {"seconds": 1.0} and status == "done"


def test_a_late_part_is_cut_and_keeps_what_it_has(run):
    def part(context):
        context.measure("first", lambda: time.sleep(0.05) or {"x": 1.0})
        context.measure("second", lambda: {"x": 2.0})

    found, (status, detail) = run(part, seconds=0.01)
    assert list(found) == ["first"] and status == "cut" and "its time was over" in detail


def test_a_part_that_cannot_begin_is_told(run):
    assert run(lambda context: fails(ResourceError("no room")))[1] == ("failed", "no room")


def test_memory_of_a_failed_measurement_is_given_back(run):
    alive = []

    class Tensor:
        def __del__(self):
            alive.append("gone")

    def deep():
        tensor = Tensor()
        raise torch.OutOfMemoryError(f"CUDA out of memory {tensor is None}")

    def work():
        try:
            deep()
        except torch.OutOfMemoryError as failure:
            raise ResourceError("out of memory") from failure

    def part(context):
        context.measure("first", work)
        assert alive == ["gone"]

    assert run(part)[0]["first"].error == "out of memory"


def test_a_gpu_that_stopped_answering_ends_the_process_after_the_part_is_noted(run, monkeypatch):
    monkeypatch.setattr(part_run, "answers", lambda: False)
    results = None

    def part(context):
        nonlocal results
        results = context.results
        context.measure("first", fails, RuntimeError("CUDA error: an illegal memory access was encountered"))

    with pytest.raises(BrokenContextError):
        run(part)
    assert results.read().ends["part"][0] == "failed"
    assert "illegal memory access" in results.read().measurements["part", "first"].error


def test_the_model_of_a_precision_is_gone_before_the_next_is_built(run, monkeypatch):
    """Both do not fit on a card for which the number of layers is computed."""
    alive, before = weakref.WeakSet(), []

    class Step:
        def __init__(self, *_):
            before.append(len(alive))
            alive.add(self)

    work = SimpleNamespace(run=None)
    monkeypatch.setattr(step_speed, "OurStep", Step)
    monkeypatch.setattr(step_speed, "explained", lambda *_: nullcontext())
    monkeypatch.setattr(step_speed, "_size", lambda _: "a model")
    monkeypatch.setattr(step_speed, "_figures", lambda *_: {"x": 1.0})
    two = [SimpleNamespace(name=name, training={}, fp8=name == "FP8") for name in ("bf16", "FP8")]
    monkeypatch.setattr(step_speed, "precisions", lambda _: two)
    found, _ = run(lambda context: step_speed._measure(context, lambda **_: work, recipes=True))
    assert before == [0, 0] and len(found) == len(step_speed.DOCUMENTS) + len(step_speed.FP8_DOCUMENTS)


def test_a_model_with_experts_is_freed_when_it_is_done_with():
    """Megatron's token dispatcher keeps a graph whose hooks lead back to the model, out of the collector's sight."""
    from llada_megatron.tools.bench.gpu import workloads
    from llada_megatron.tools.bench.measurement import single_process

    def model_after_a_step():
        work = workloads.moe(0)
        with step_speed.built(work) as step:
            step.step_on(work.batch(2))
            return weakref.ref(step.models[0])

    with single_process():
        model = model_after_a_step()
        part_run.release_memory()
        assert model() is None


def test_a_part_that_is_cut_leaves_no_memory_to_the_next(run):
    alive = []

    class Model:
        def __init__(self):
            self.itself = self  # only the collector finds it

        def __del__(self):
            alive.append("gone")

    def part(context):
        model = Model()
        context.measure("first", lambda: time.sleep(0.05) or {"x": 1.0})
        context.measure("second", lambda: {"x": float(model is None)})

    assert run(part, seconds=0.01)[1][0] == "cut" and alive == ["gone"]
