"""The process of a group of parts: what it hides, what it is told, and how it leaves."""

from __future__ import annotations

import io
import json
from dataclasses import asdict

import pytest

from llada_megatron.tools.bench.gpu import worker_process
from llada_megatron.tools.bench.gpu.measured_machine import Machine
from llada_megatron.tools.bench.gpu.part_run import BrokenContextError
from llada_megatron.tools.bench.gpu.parts import BY_NAME
from llada_megatron.tools.bench.gpu.results_file import ResultsFile
from llada_megatron.tools.bench.gpu.worker_process import START_ANEW

HERE = Machine("a GPU", 80 * 10**9, 90, "2.11.0")


class LeftError(Exception):
    pass


@pytest.fixture
def worker(tmp_path, monkeypatch):
    done = {"hidden": []}

    def leave(code):
        raise LeftError(code)

    monkeypatch.setattr(worker_process, "die_with_parent", lambda parent: done.update(parent=parent))
    monkeypatch.setattr(worker_process.signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker_process, "_redirect_output", lambda path: done.update(log=path) or io.StringIO())
    monkeypatch.setattr(worker_process.accelerations, "hide", done["hidden"].append)
    monkeypatch.setattr(worker_process, "_leave", leave)

    def run(name, group=lambda *_, **__: 0):
        monkeypatch.setattr(worker_process, "run_group", group)
        part = BY_NAME[name]
        options = {
            "output": tmp_path / "bench.jsonl",
            "process": part.process,
            "machine": json.dumps(asdict(HERE)),
            "parts": name,
            "until": 5.0,
            "parent": 7,
        }
        with pytest.raises(LeftError) as left:
            worker_process.main([word for key, value in options.items() for word in (f"--{key}", str(value))])
        return left.value.args[0], done

    return run


@pytest.mark.parametrize(("name", "hidden"), [("exact-local", ["transformer_engine"]), ("exact", []), ("dense", [])])
def test_transformer_engine_is_hidden_where_a_part_is_to_do_without(worker, name, hidden):
    code, done = worker(name)
    assert code == 0 and done["hidden"] == hidden and done["parent"] == 7


def test_it_runs_what_it_is_told_and_on_the_cpu_with_half_of_the_cores(worker, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    seen = {}
    worker("reference", lambda *told, **options: seen.update(told=told, **options) or 3)
    parts, results, machine, until, _ = seen["told"]
    assert (parts, machine, until) == ([BY_NAME["reference"]], HERE, 5.0) and seen["threads"] == 8
    assert results.path.name == "bench.jsonl"


def test_a_broken_gpu_is_left_without_asking_it_anything_more(tmp_path, monkeypatch):
    def fails(*_):
        raise BrokenContextError

    left = []
    monkeypatch.setattr(worker_process, "run_part", fails)
    monkeypatch.setattr(worker_process, "_leave", lambda code: left.append(code) or code)
    with open(tmp_path / "log", "w") as log:
        code = worker_process.run_group([BY_NAME["loss"]], ResultsFile(tmp_path / "b"), HERE, float("inf"), log)
    assert left == [START_ANEW] and code == START_ANEW
