"""Code that is not ours: what it takes is bounded, what it does ends in one line, and the next call works."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.llada_moe.guard import process
from llada_megatron.llada_moe.guard.limits import Limits

LIMITS = Limits(wall_s=120, memory_bytes=2**28, answer_bytes=2**20)


@pytest.fixture(autouse=True)
def limits(monkeypatch):
    monkeypatch.setattr(process, "LIMITS", LIMITS)


def call(function, *arguments, **options):
    return process.call("the file", function, *arguments, **options)


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        ("timeit:timeit", ["while True: pass"], "takes more than 1 seconds of processor time: refused"),
        ("operator:mul", ["a", 10**11], "takes more than 0.25 GiB of memory: refused"),
        ("operator:mul", ["a", 2**21], "gives more than 1 MiB"),
        ("os:abort", [], r"ends the process that runs it \(SIGABRT\)"),
        ("ctypes:string_at", [0], r"ends the process that runs it \(SIGSEGV\)"),
        ("os:_exit", [3], r"ends the process that runs it \(exit code 3\)"),
        ("sys:exit", [3], r"fails \(SystemExit: 3\)"),
        ("json:loads", ["[" * 10**5], r"fails \(RecursionError: "),
        ("builtins:__import__", ["x" * 10**5], r"fails \(ModuleNotFoundError: .{0,400}…\)$"),
        ("os:getenv", [], r"fails \(TypeError: "),
    ],
)
def test_what_goes_wrong_is_one_line_and_the_next_call_works(function, arguments, said):
    with pytest.raises(DataError, match=f"^the file {said}") as error:
        call(function, *arguments, cpu_s=1)
    assert "\n" not in str(error.value)
    assert call("operator:add", 1, 2) == 3


def test_what_waits_for_ever_is_ended(monkeypatch):
    monkeypatch.setattr(process, "LIMITS", Limits(wall_s=0.2))
    with pytest.raises(DataError, match="gave no answer for 0.2 seconds"):
        call("time:sleep", 1000)


def test_an_error_for_the_user_keeps_its_kind():
    path = "llada_megatron.llada_moe.config:load_model"
    with pytest.raises(ConfigError, match="^no model 'nothing'"):
        call(path, "nothing")


def test_what_a_library_prints_is_no_answer():
    assert call("builtins:print", "x" * 100) is None
    assert call("os:system", "echo printed; exit 3") >> 8 == 3
    assert call("operator:concat", "é\ud800", "\0") == "é\ud800\0"


def test_ctrl_c_leaves_no_late_answer():
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        call("time:sleep", 1000)
    timer.join()
    assert call("operator:add", 1, 2) == 3


def test_a_forked_process_has_one_of_its_own():
    mine = call("os:getpid")
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if call("os:getpid") != mine and call("os:getppid") == os.getpid() else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert call("os:getpid") == mine


def test_it_does_not_outlive_a_killed_process():
    program = (
        "import os, signal; from llada_megatron.llada_moe.guard.process import call; "
        "print(call('it', 'os:getpid'), flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    end = time.monotonic() + 60
    while psutil.pid_exists(int(done.stdout)) and psutil.Process(int(done.stdout)).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.02)
