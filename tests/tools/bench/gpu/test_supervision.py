"""Processes that die take one part with them; the others run, in new processes."""

from __future__ import annotations

import itertools
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from llada_megatron.tools.bench.gpu.measured_machine import Machine
from llada_megatron.tools.bench.gpu.parts import AS_TRAINED, ON_CPU, PARTS, Part, chosen, planned_seconds, stages
from llada_megatron.tools.bench.gpu.results_file import Measurement, ResultsFile
from llada_megatron.tools.bench.gpu.supervision import Supervisor, start_worker
from llada_megatron.tools.bench.gpu.worker_process import START_ANEW

HERE = Machine("a GPU", 80 * 10**9, 90, "2.11.0")


def part(name, process=AS_TRAINED, seconds=60, beside=(), needs=""):
    return Part(name, process, seconds, "nowhere:nothing", "for a test", beside, needs)


class FakeWorker:
    """Begins and ends its parts; at one named in `dies` it ends with that exit code."""

    def __init__(self, parts, results, dies):
        self.killed, self._code, self.names = threading.Event(), 0, [part.name for part in parts]
        for name in self.names:
            results.begin(name)
            if name in dies:
                self._code = dies[name]
                if self._code == START_ANEW:
                    results.end(name, "failed", "CUDA error")
                return
            results.end(name, "done")

    def wait(self, timeout=None):
        if self._code is None:
            self.killed.wait(timeout)
            return -9
        return self._code

    def kill(self):
        self.killed.set()


@pytest.fixture
def supervised(tmp_path):
    results = ResultsFile(tmp_path / "bench.jsonl")
    results.open_for(HERE)

    def run(parts, dies=(), until=60.0, at_first=None):
        """`at_first`: how parts end, other than done, in the first process."""
        started = []

        def start(left, *_):
            started.append(FakeWorker(left, results, dict(dies)))
            for name, end in (at_first or {}).items() if len(started) == 1 else ():
                results.end(name, *end)
            return started[-1]

        Supervisor(results, HERE, time.monotonic() + until, start).run(parts)
        return [worker.names for worker in started], results.read().ends

    run.results = results
    return run


@pytest.mark.parametrize(
    ("code", "said"), [(-signal.SIGSEGV, "signal SIGSEGV"), (1, "exit code 1"), (START_ANEW, "CUDA error")]
)
def test_what_is_left_runs_in_a_new_process(supervised, code, said):
    started, ends = supervised([part("a"), part("b"), part("c")], {"b": code})
    assert started == [["a", "b", "c"], ["c"]]
    assert ends["a"][0] == ends["c"][0] == "done"
    assert ends["b"][0] == "failed" and said in ends["b"][1]


def test_what_is_done_is_left_out_and_what_was_cut_or_failed_runs_again(supervised):
    for name, status in (("a", "done"), ("b", "cut"), ("c", "failed")):
        supervised.results.end(name, status)
    started, ends = supervised([part("a"), part("b"), part("c"), part("d")])
    assert started == [["b", "c", "d"]] and {status for status, _ in ends.values()} == {"done"}


@pytest.mark.parametrize(("ago", "status"), [(50.0, "failed"), (200.0, "cut")])
def test_a_death_is_judged_by_the_age_of_the_part_not_of_its_process(supervised, monkeypatch, ago, status):
    began = SimpleNamespace(time=lambda: time.time() - ago)
    monkeypatch.setattr("llada_megatron.tools.bench.gpu.results_file.time", began)
    _, ends = supervised([part("a")], {"a": -signal.SIGSEGV}, until=5.0)
    assert ends["a"][0] == status and f"{ago:.0f} s into this part (signal SIGSEGV)" in ends["a"][1]


@pytest.mark.parametrize(("until", "runs"), [(60.0, 2), (5.0, 1)])
def test_what_was_cut_runs_once_more_in_the_time_that_is_left(supervised, until, runs):
    cut = {"b": ("cut", "its time was over")}
    started, ends = supervised([part("a"), part("b")], until=until, at_first=cut)
    assert started == [["a", "b"], ["b"]][:runs] and ends["b"][0] == ("done" if runs == 2 else "cut")


def test_what_needs_a_part_that_was_cut_runs_again_after_it(supervised):
    ended = {"a": ("cut", "its time was over"), "b": ("failed", "the figures of a are missing")}
    started, ends = supervised([part("a"), part("b", needs="a"), part("c")], at_first=ended)
    assert started == [["a", "b", "c"], ["a", "b"]] and {status for status, _ in ends.values()} == {"done"}


def test_a_process_that_never_begins_fails_its_parts_once(supervised, monkeypatch):
    monkeypatch.setattr(
        FakeWorker, "__init__", lambda self, parts, results, dies: vars(self).update(names=["x"], _code=2)
    )
    monkeypatch.setattr(FakeWorker, "kill", lambda self: None)
    started, ends = supervised([part("a"), part("b")])
    assert len(started) == 1
    assert all(status == "failed" and "before it began a part (exit code 2)" in said for status, said in ends.values())


def test_no_process_starts_when_the_time_is_over(supervised):
    assert supervised([part("a")], until=-1.0) == ([], {})


def test_an_interrupt_ends_the_processes_and_starts_no_other(supervised):
    began = threading.get_ident()
    threading.Timer(0.2, signal.pthread_kill, (began, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        supervised([part("a"), part("b")], {"a": None})
    assert supervised.results.read().begun.keys() == {"a"} and supervised.results.read().ends == {}


def test_parts_of_one_kind_share_a_process_and_one_beside_runs_at_the_same_time():
    made = [part("a"), part("b"), part("c", ON_CPU, 90, beside=("a", "b")), part("d", "exact"), part("e")]
    names = [[[each.name for each in group] for group in together] for together in stages(made)]
    assert names == [[["a", "b"], ["c"]], [["d"]], [["e"]]]
    assert stages(made[2:3]) == [[[made[2]]]]
    timed = [part("a"), part("b", ON_CPU, beside=("a",)), part("c", "exact", beside=("d",), needs="b")]
    assert [[[each.name for each in group] for group in together] for together in stages(timed)] == [
        [["a"], ["b"]],
        [["c"]],
    ]
    assert planned_seconds(made) == (60 + 60 + 10) + (60 + 10) + (60 + 10)


def test_the_whole_plan_fits_into_eight_minutes():
    assert planned_seconds(PARTS) <= 460  # the command's eight minutes end with 20 s for the last part to end
    assert [each.name for each in chosen(["profile", "exact"])] == ["reference", "exact", "profile"]


def test_a_worker_is_told_its_parts_and_what_it_must_not_see(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr("subprocess.Popen", lambda command, **options: seen.update(command=command, **options))
    for each, variable, value in (
        (next(p for p in PARTS if p.process == ON_CPU), "CUDA_VISIBLE_DEVICES", ""),
        (next(p for p in PARTS if p.name == "exact"), "NVIDIA_TF32_OVERRIDE", "0"),
    ):
        start_worker([each], ResultsFile(tmp_path / "b.jsonl"), HERE, 5.0)
        options = dict(itertools.pairwise(seen["command"]))
        assert options["--parts"] == each.name and options["--output"] == str(tmp_path / "b.jsonl")
        assert seen["env"][variable] == value


def test_measurements_survive_a_new_plan(supervised):
    supervised.results.add(Measurement("a", "figure", {"x": 1.0}, 0.1))
    supervised.results.end("a", "cut")
    supervised([part("a")])
    assert supervised.results.read().figure("a", "figure", "x") == 1.0
