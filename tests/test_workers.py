"""How tests are spread over processes: groups, their order, and tests that have the machine for themselves."""

import fcntl
import threading
import time
from types import SimpleNamespace

import pytest

from tests import workers


def item(path, *marks):
    return SimpleNamespace(path=workers.ROOT / path, get_closest_marker=lambda name: name if name in marks else None)


def locked(path):
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def test_a_file_is_a_group_and_so_is_a_folder_that_shares_a_fixture():
    files = ["tests/parallel/test_parity.py", "tests/slurm/test_faults.py", "tests/slurm/test_course.py"]
    assert [workers.group_of(item(path)) for path in files] == [files[0], "tests/slurm", "tests/slurm"]
    assert workers.group_of(item(files[0], "alone")) == "alone"


def test_what_waits_comes_first_and_what_runs_alone_last():
    quiet = item("tests/launch/cluster/test_agent.py", "alone")
    waiting = [item("tests/slurm/test_faults.py"), item("tests/launch/cluster/test_agent.py")]
    ordinary = item("tests/parallel/test_parity.py")
    assert sorted([quiet, ordinary, *reversed(waiting)], key=workers.rank_of) == [*waiting, ordinary, quiet]


def test_a_test_that_runs_alone_waits_for_the_others_and_keeps_new_ones_waiting(tmp_path):
    for name in ("conftest.py", "workers.py"):
        (tmp_path / name).touch()
    order = []

    def later(alone, name):
        def run():
            with workers.machine(alone, tmp_path):
                order.append(name)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    with workers.machine(False, tmp_path):
        later(False, "together").join(60)
        alone = later(True, "alone")
        while not locked(tmp_path / "conftest.py"):
            time.sleep(0.01)
        late = later(False, "late")
        late.join(0.2)
        order.append("end")
    alone.join(60)
    late.join(60)
    assert order == ["together", "end", "alone", "late"]


def test_pytest_xdist_sees_the_groups(request):
    """It names the group after an `@`; without it the tests of one file are spread over all processes."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("one process runs all tests")
    assert request.node.nodeid.endswith("@tests/test_workers.py")
