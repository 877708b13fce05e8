"""Running tasks: they stop soon, and the directory stays locked until they have."""

import os
import signal
import threading
import time

import pytest

from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.parallel.checkpoint import manifest as checkpoint_manifest
from llada_megatron.tools.convert.tasks import StoppedError, Task, TaskResult, run_tasks
from llada_megatron.tools.convert.workspace import Workspace
from tests.tools.convert.checkpoints import to_huggingface, to_sharded, written


def test_a_second_control_c_waits_for_the_threads(tmp_path, capsys):
    working, locked = threading.Barrier(3, timeout=20), []

    def stubborn(progress):
        working.wait()
        time.sleep(0.5)  # as long as a sync can take
        try:
            Workspace(tmp_path / "out", {})
        except ResourceError:
            locked.append(True)
        progress.advance(1)

    def press():
        working.wait()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)

    threading.Thread(target=press).start()
    with pytest.raises(KeyboardInterrupt), Workspace(tmp_path / "out", {}) as work:
        run_tasks(work, [Task(number, stubborn) for number in range(4)], 2, "testing")
    assert locked == [True, True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "stopping …" in capsys.readouterr().err


def test_a_failure_stops_the_others(tmp_path, capsys):
    stopped = []
    waiting = threading.Barrier(2, timeout=20)

    def patient(progress):
        waiting.wait()
        try:
            while True:
                time.sleep(0.01)
                progress.advance(1)
        except StoppedError:
            stopped.append(True)
            raise

    def failing(progress):
        waiting.wait()
        raise ValueError("no")

    tasks = [Task(0, lambda progress: TaskResult("done")), Task(1, patient), Task(2, failing)]
    with pytest.raises(ValueError, match="no"), Workspace(tmp_path / "out", {}) as work:
        run_tasks(work, tasks, 2, "testing")
    assert stopped == [True] and "stopping …" in capsys.readouterr().err


def test_hashing_is_a_part_of_the_work_and_stops(tmp_path, monkeypatch):
    to_sharded(written(tmp_path / "source", "tiny-dense"), tmp_path / "run")
    monkeypatch.setattr(checkpoint_manifest, "_BLOCK", 1000)
    from llada_megatron.tools.convert import exporter

    seen = {}

    def run(workspace, tasks, workers, title):
        counts = []
        for task in tasks:
            counts.clear()
            task.run(type("Progress", (), {"advance": staticmethod(counts.append)})())
            assert sum(counts) == task.size
            if task.reads:
                seen[task.number] = len(counts)
        return [None] * len(tasks)

    monkeypatch.setattr(exporter, "run_tasks", run)
    to_huggingface(tmp_path / "run", tmp_path / "out")
    assert max(seen.values()) > 10
