"""The end of a rank: signals that come while Python shuts down no longer matter."""

import os
import subprocess
import sys

from llada_megatron.launch.ranks.rank_reports import REPORTS_VARIABLE, read_result

# Python gives signals their default action, to kill, before it takes modules apart: `late` is taken apart then.
PROGRAM = """
import os, signal, sys
from pathlib import Path
from llada_megatron.launch.ranks.rank import StopRequest
from llada_megatron.launch.ranks.rank import run_local_rank
from llada_megatron.llada_moe.config.layout import LayoutConfig

class Late:
    def __del__(self, kill=os.kill, me=os.getpid(), numbers=(signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR2)):
        for number in numbers:
            kill(me, number)
        print("late", flush=True)

late = Late()
stop = StopRequest(patient=True).listen([signal.SIGUSR1, signal.SIGTERM])
sys.exit(run_local_rank(lambda stop: {"steps": 3}, LayoutConfig(), Path("logs"), stop))
"""


def test_a_request_to_stop_that_comes_after_the_work_does_not_kill_the_rank(tmp_path):
    (tmp_path / "reports").mkdir()
    variables = os.environ | {"RANK": "0", "WORLD_SIZE": "1", REPORTS_VARIABLE: str(tmp_path / "reports")}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, env=variables, timeout=120)
    assert done.returncode == 0
    assert "late" in (tmp_path / "logs/rank-0.log").read_text()
    assert read_result(tmp_path / "reports") == {"steps": 3}


def test_a_thread_of_a_library_that_fails_is_in_the_log_and_not_on_the_terminal(tmp_path):
    program = (
        "import threading\nfrom pathlib import Path\nfrom llada_megatron.launch.ranks.rank import quieten\n"
        "restore = quieten(0, Path('logs'))\n"
        "thread = threading.Thread(target=lambda: open('nowhere/file'))\nthread.start()\nthread.join()\nrestore()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    log = (tmp_path / "logs/rank-0.log").read_text()
    assert "a thread failed: [Errno 2]" in log and "Traceback" in log
