"""A conversion that is killed at any moment and started again ends in the same bytes; Ctrl-C."""

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from llada_megatron import cli
from llada_megatron.llada_moe.config import load_model
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.tools.convert import importer
from tests.tools.convert.checkpoints import config_of, files_of, tensors_of, to_sharded, write

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree")
"""Audit events of CPython that come right before a change of the file system."""
LARGE = load_model(
    "tiny-moe",
    [f"{key}=256" for key in ("hidden_size", "moe.expert_ffn_hidden_size", "moe.shared_expert_ffn_hidden_size")],
)
"""15 MB."""


def _convert(words, task_bytes, number, event, seconds, result):
    """`llada convert` that sends itself a signal right before its event of this number, or after some seconds."""
    importer.TASK_BYTES = task_bytes
    place, events = os.path.dirname(words[2]), itertools.count(1)

    def hook(name, arguments):
        if name in EVENTS and str(arguments[0]).startswith(place) and next(events) == event:
            os.kill(os.getpid(), number)

    sys.addaudithook(hook)
    if seconds is not None:
        threading.Timer(seconds, os.kill, (os.getpid(), number)).start()
    begin = time.perf_counter()
    with open(os.devnull, "w") as nowhere:
        sys.stderr = nowhere
        code = cli.main(["convert", *words])
        sys.stderr = sys.__stderr__
    result.send((code, next(events), time.perf_counter() - begin))
    os._exit(0)  # the timer may still run


class Conversion:
    """One command that is done several times, each in a process of its own."""

    def __init__(self, words, target, task_bytes):
        self.words, self.task_bytes, self.target = words, task_bytes, target
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["llada_megatron.parallel.preload"])

    def start(self, target=None, number=signal.SIGKILL, event=0, seconds=None):
        """The process, and the pipe with what it says at its end."""
        target = target or self.target
        target.parent.mkdir(exist_ok=True)
        receiver, sender = self.context.Pipe(duplex=False)
        words = [*self.words[:2], str(target), *self.words[2:]]
        process = self.context.Process(target=_convert, args=(words, self.task_bytes, number, event, seconds, sender))
        process.start()
        sender.close()
        return process, receiver

    def run(self, **options):
        """(exit code, events, seconds), or None for a process that was killed."""
        process, receiver = self.start(**options)
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
        return receiver.recv() if process.exitcode == 0 else None

    def finish(self, expected, attempts=()):
        """Start again until it ends; the result has the expected bytes, and nothing else is left."""
        code = next(found[0] for found in (self.run(**options) for options in (*attempts, {})) if found is not None)
        assert code == 0 or (code == 2 and self.target.exists())  # 2: it had ended but for an empty folder
        assert differing_files(self.target, expected) == []
        assert [path.name for path in self.target.parent.iterdir()] == [self.target.name]
        shutil.rmtree(self.target.parent)


def differing_files(directory, expected):
    found = files_of(directory)
    return [name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("interrupted")


@pytest.fixture(scope="module", params=["import", "export"])
def small(root, request):
    """A conversion in a dozen tasks, what it makes, and how many events it takes."""
    return _prepared(root / f"small-{request.param}", request.param, "tiny-moe", 40_000)


@pytest.fixture(scope="module", params=["import", "export"])
def large(root, request):
    return _prepared(root / f"large-{request.param}", request.param, LARGE, 2_000_000)


def _prepared(place, direction, model, part):
    source = write(place / "source", tensors_of(model), config_of(model), files=2)
    words = ["import", str(source), "--layout", "pipeline_parallel=2,expert_parallel=2", "--workers", "2"]
    if direction == "export":
        to_sharded(source, place / "sharded", "tensor_parallel=2")
        words = ["export", str(place / "sharded"), "--shard-size", f"{part}", "--without-tokenizer", "--workers", "2"]
    conversion = Conversion(words, place / "again/out", part)
    code, events, seconds = conversion.run(target=place / "undisturbed/out")
    assert code == 0
    return conversion, files_of(place / "undisturbed/out"), events, seconds


@pytest.mark.parametrize("seed", range(4))
def test_killed_before_any_change_of_the_file_system(small, seed):
    conversion, expected, events, _ = small
    draw = random.Random(seed)
    moments = [draw.randrange(1, int(events * share)) for share in (0.7, 0.5, 0.3, 0.2)]
    assert conversion.run(event=moments[0]) is None
    conversion.finish(expected, [{"event": moment} for moment in moments[1:]])


@pytest.mark.parametrize("back", [1, 2, 3, 4, 5, 7, 9, 11, 13, 16])
def test_killed_at_the_very_end(small, back):
    conversion, expected, events, _ = small
    assert conversion.run(event=events - back) is None
    conversion.finish(expected)


@pytest.mark.parametrize("seed", range(2))
def test_killed_in_the_middle_of_writing(large, seed):
    conversion, expected, _, seconds = large
    draw = random.Random(seed)
    conversion.finish(expected, [{"seconds": draw.uniform(0, 0.6 * seconds)} for _ in range(4)])


def test_what_is_done_is_not_done_again(small):
    conversion, expected, events, _ = small
    conversion.run(event=events // 2)
    before = {path: path.stat().st_mtime_ns for path in conversion.target.parent.rglob("output/**/*") if path.is_file()}
    journal = list(conversion.target.parent.rglob("journal/*.json"))
    assert journal and not conversion.target.exists()
    work = conversion.target.with_name(".out.converting") / "output"
    code, fewer, _ = conversion.run()
    assert code == 0 and fewer < events
    kept = sum((conversion.target / path.relative_to(work)).stat().st_mtime_ns == at for path, at in before.items())
    assert kept >= 1
    assert differing_files(conversion.target, expected) == []
    shutil.rmtree(conversion.target.parent)


def test_another_process_that_converts_to_the_same_place(small):
    conversion, expected, events, _ = small
    process, receiver = conversion.start(number=signal.SIGSTOP, event=events // 2)
    while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
        time.sleep(0.01)
    try:
        assert conversion.run()[0] == 1
        with pytest.raises(ResourceError, match=r"another process is converting to the same place \(.*\): wait for it"):
            to_sharded(conversion.target.parent.parent / "source", conversion.target)
    finally:
        while not receiver.poll(0.05):
            os.kill(process.pid, signal.SIGCONT)
    assert receiver.recv()[0] == 0
    process.join(10)
    assert differing_files(conversion.target, expected) == []
    shutil.rmtree(conversion.target.parent)


# --- Ctrl-C ---------------------------------------------------------------------------------------------------


def test_control_c(large, capsys):
    conversion, expected, _, _ = large
    if conversion.words[0] == "import":
        pytest.skip("one task: the size of an import's tasks is no option")
    conversion.target.parent.mkdir()
    words = [*conversion.words[:2], str(conversion.target), *conversion.words[2:-1], "1", "--json"]
    command = [sys.executable, "-m", "llada_megatron.cli", "convert", *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not list(conversion.target.parent.rglob("journal/*.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.splitlines()[-1] == "interrupted" and "Traceback" not in err + out
    done = len(list(conversion.target.parent.rglob("journal/*.json")))
    assert not conversion.target.exists()
    assert cli.main(["convert", *words]) == 0
    captured = capsys.readouterr()
    assert f"continuing an interrupted conversion: {done} of " in captured.err
    assert json.loads(captured.out.splitlines()[-1])["directory"] == str(conversion.target)
    assert differing_files(conversion.target, expected) == []
