"""The run lock: who is refused, who takes over, and what a kill leaves."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from llada_megatron.launch import run_lock
from llada_megatron.launch.run_lock import Holder, RunLock, check_free
from llada_megatron.llada_moe.errors import ResourceError

ELSEWHERE = {"host": "node17", "machine": "another boot"}

HOLD = """
import sys, time
from llada_megatron.launch.run_lock import RunLock
with RunLock.take(sys.argv[1], sys.argv[2] or None):
    print("held", flush=True)
    time.sleep(120)
"""


def leave(directory, age_s=0.0, **values):
    """A run lock as some process left it `age_s` seconds ago."""
    holder = dataclasses.replace(Holder.this_process(None), **values)
    path = directory / run_lock.FILE_NAME
    path.write_text(json.dumps(dataclasses.asdict(holder)))
    os.utime(path, (time.time() - age_s,) * 2)


def taken_over(directory, job_id=None):
    check_free(directory, job_id)
    before = (directory / run_lock.FILE_NAME).read_text()
    with RunLock.take(directory, job_id):
        after = json.loads((directory / run_lock.FILE_NAME).read_text())
        assert after["token"] != json.loads(before)["token"]
        assert after["pid"] == os.getpid()
    return os.listdir(directory) == []


@pytest.fixture
def holding(tmp_path):
    """Starts a process that holds the directory; ended with the test."""
    started = []

    def start(job_id=""):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path), job_id], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_directory_is_free_before_while_nobody_trains_and_after(tmp_path):
    check_free(tmp_path / "new")
    with RunLock.take(tmp_path / "new"):
        pass
    assert os.listdir(tmp_path / "new") == []


def test_the_second_of_two_live_processes_is_refused_and_told_who_holds_it(tmp_path, holding):
    process = holding(job_id="42")
    for ask in (lambda: check_free(tmp_path), lambda: RunLock.take(tmp_path, "43").__enter__()):
        with pytest.raises(ResourceError) as caught:
            ask()
        said = f"is being trained by job 42, process {process.pid} on host {os.uname().nodename} since 20"
        assert said in str(caught.value)
        assert "set another output_dir" in str(caught.value)


def test_what_a_kill_leaves_is_taken_over_at_once(tmp_path, holding):
    process = holding()
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still a zombie
    assert taken_over(tmp_path)


def test_a_number_given_to_another_process_is_not_the_holder(tmp_path):
    leave(tmp_path, started=Holder.this_process(None).started - 3600)
    assert taken_over(tmp_path)


def test_a_clock_that_is_put_right_does_not_make_the_holder_another_process(tmp_path, holding, monkeypatch):
    holding()
    created = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: created(process) + 3600)
    with pytest.raises(ResourceError):
        check_free(tmp_path)


def test_a_holder_on_another_machine_counts_while_it_renews(tmp_path):
    leave(tmp_path, age_s=run_lock.STALE_S / 2, **ELSEWHERE)
    with pytest.raises(ResourceError, match=r"on host node17 .*try again in 60 seconds"):
        check_free(tmp_path)
    with pytest.raises(ResourceError, match="node17"):
        RunLock.take(tmp_path).__enter__()
    leave(tmp_path, age_s=run_lock.STALE_S + 5, **ELSEWHERE)
    assert taken_over(tmp_path)


def test_a_host_of_the_same_name_that_was_booted_again_or_is_another_container_is_another_machine(tmp_path):
    alive = Holder.this_process(None)
    assert alive.is_here() and alive.lives()
    for boot, namespace in (("another boot", alive.machine.split()[1]), (alive.machine.split()[0], "pid:[1]")):
        there = {"machine": f"{boot} {namespace}"}
        leave(tmp_path, pid=2**22 + 1, age_s=run_lock.STALE_S / 2, **there)  # no such process here, which says nothing
        with pytest.raises(ResourceError, match="try again in 60 seconds"):
            check_free(tmp_path)
        leave(tmp_path, age_s=run_lock.STALE_S + 5, **there)  # this process has the number of that one
        assert taken_over(tmp_path)


def test_a_requeued_job_takes_over_what_it_left_on_another_machine(tmp_path):
    leave(tmp_path, job_id="42", **ELSEWHERE)
    assert taken_over(tmp_path, job_id="42")


def test_storage_without_hard_links_will_do(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(os, "link", refuse)
    with RunLock.take(tmp_path), pytest.raises(ResourceError, match=f"process {os.getpid()}"):
        RunLock.take(tmp_path, "43").__enter__()
    leave(tmp_path, age_s=run_lock.STALE_S + 5, **ELSEWHERE)
    assert taken_over(tmp_path)


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            RunLock.take(tmp_path).__enter__()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_a_restart_waits_for_the_last_process_of_its_own_job(tmp_path, holding):
    process = holding(job_id="42")
    threading.Timer(1.0, process.kill).start()
    assert taken_over(tmp_path, job_id="42")


def test_an_unreadable_lock_counts_for_as_long_as_one_of_another_machine(tmp_path):
    (tmp_path / run_lock.FILE_NAME).write_text("{")
    with pytest.raises(ResourceError):
        check_free(tmp_path)
    os.utime(tmp_path / run_lock.FILE_NAME, (0, 0))
    check_free(tmp_path)


def test_it_is_renewed_and_one_that_was_taken_over_is_noticed_and_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "RENEWAL_S", 0.05)
    path = tmp_path / run_lock.FILE_NAME

    def eventually(condition):
        deadline = time.monotonic() + 30
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)
        return condition()

    with RunLock.take(tmp_path) as held:
        os.utime(path, (0, 0))
        assert eventually(lambda: path.stat().st_mtime > 0)
        held.check()
        path.unlink()
        assert eventually(path.exists)
        path.unlink()
        leave(tmp_path, token="theirs", **ELSEWHERE)
        assert eventually(lambda: held._taken_by is not None)
        with pytest.raises(ResourceError, match="was taken over by process .* on host node17"):
            held.check()
    assert json.loads(path.read_text())["token"] == "theirs"
