"""The local launcher, with a stub program per rank: results, failures, signals, and nothing left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

STUB = Path(__file__).with_name("stub_rank.py")
LAUNCH = """
import sys
from pathlib import Path
from llada_megatron.launch.ranks.local import Stopped, run_local
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.recovery import RecoveryConfig
from llada_megatron.llada_moe.errors import LladaError

behaviour, directory = sys.argv[2], Path(sys.argv[3])
layout, limits = LayoutConfig(data_parallel=2), RecoveryConfig(hang_minimum_s=2, hang_factor=3)
try:
    print(run_local([sys.executable, *sys.argv[1:]], layout, directory / "logs", limits=limits))
except LladaError as error:
    sys.exit(f"{type(error).__name__}: {error}")
except Stopped as stopped:
    sys.exit(stopped.exit_code)
"""


@pytest.fixture
def launch(tmp_path):
    """Starts the launcher in a process of its own; ends it and its ranks after the test."""
    started = []

    def start(behaviour):
        command = [sys.executable, "-c", LAUNCH, str(STUB), behaviour, str(tmp_path)]
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def _pids(directory, seconds=60.0):
    """Process ids of both ranks, as soon as they run."""
    deadline = time.monotonic() + seconds
    files = [directory / f"pid-{rank}" for rank in range(2)]
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    return [int(file.read_text()) for file in files]


def _assert_gone(pids, seconds=10.0):
    deadline = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids):
        assert time.monotonic() < deadline, "a rank was left behind"
        time.sleep(0.05)


def test_rank_0_reports_and_the_terminal_stays_clean(launch, tmp_path):
    process = launch("ok")
    out, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert f"result={{'sum': 2.0, 'steps': 0, 'threads': ['{threads}', 'PASSIVE']}}, stopped_by=None" in out
    assert err == ""
    for rank in range(2):
        log = (tmp_path / "logs" / f"rank-{rank}.log").read_text()
        assert "noise on stdout" in log
        assert "noise from C" in log


def test_a_failing_rank_is_one_line_with_its_coordinates_and_log(launch, tmp_path):
    process = launch("fail")
    _out, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert err.splitlines() == [
        "RankError: rank 1 (dp 1, pp 0, tp 0, cp 0, ep 0): ValueError: the second rank has a reason; "
        f"full stack: {tmp_path}/logs/rank-1.log"
    ]
    assert re.search(
        r"(?s)Traceback.*ValueError: the second rank\nhas a reason", (tmp_path / "logs/rank-1.log").read_text()
    )
    _assert_gone(_pids(tmp_path))


def test_a_rank_that_was_ended_for_anothers_failure_is_not_blamed(launch, tmp_path):
    process = launch("fail-alone")
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "rank 0 (dp 0, pp 0, tp 0, cp 0, ep 0): ValueError: only the first" in err
    _assert_gone(_pids(tmp_path))


def test_an_error_of_the_users_comes_as_it_is_and_once(launch):
    _out, err = launch("user-error").communicate(timeout=90)
    assert err.splitlines() == ["DataError: the corpus is empty; give it text"]


def test_a_killed_rank_is_named_rather_than_its_victims(launch, tmp_path):
    process = launch("killed")
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert "rank 1 (dp 1, pp 0, tp 0, cp 0, ep 0) was killed by SIGKILL (out of memory?)" in err
    _assert_gone(_pids(tmp_path))


def test_ranks_that_hang_are_named_and_ended_with_their_stacks_in_the_logs(launch, tmp_path):
    process = launch("hang")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "the run hangs, so its ranks were ended. rank 1 (dp 1, pp 0, tp 0, cp 0, ep 0): " in err
    assert "(step, 4 steps done), its process is sleeping" in err
    for rank in range(2):
        assert "in work" in (tmp_path / f"logs/rank-{rank}.log").read_text()
    _assert_gone(_pids(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_first_signal_lets_the_ranks_finish(launch, tmp_path, number):
    process = launch("run")
    pids = _pids(tmp_path)
    sockets = psutil.Process(process.pid).net_connections("tcp")
    reachable = {
        s.laddr.port for s in sockets if s.status == psutil.CONN_LISTEN and s.laddr.ip not in ("127.0.0.1", "::1")
    }
    assert len(reachable) <= 1, "torch's rendezvous, whose content is unpickled, can be reached from the network"
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert f"stopped_by={int(number)}" in out
    assert "stopping after this step" in err
    _assert_gone(pids)


def test_a_signal_during_the_start_is_not_lost(launch, tmp_path):
    process = launch("run")
    while len(psutil.Process(process.pid).children()) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert "stopped_by=2" in out, err
    assert "Traceback" not in err


def test_a_second_signal_ends_everything_at_once(launch, tmp_path):
    process = launch("deaf")
    pids = _pids(tmp_path)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert time.monotonic() - began < 10
    _assert_gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's parent-death signal (Linux)")
def test_no_rank_outlives_a_killed_launcher(launch, tmp_path):
    process = launch("deaf")
    pids = _pids(tmp_path)
    process.kill()
    _assert_gone(pids)
