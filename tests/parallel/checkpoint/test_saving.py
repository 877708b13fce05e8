"""Saves as the trainer makes them: failures that training outlives, what stays, copies, and resuming from them."""

import contextlib
import errno
import shutil
import signal
import subprocess
import time
from types import SimpleNamespace

import pytest
from torch import distributed as dist

from llada_megatron.llada_moe.config.intervals import CheckpointConfig
from llada_megatron.llada_moe.errors import LladaError, ResourceError
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.checkpoint.copier import copy_files
from tests.parallel.checkpoint.test_store import _check, _damage, _flip, _state, names
from tests.ranks import run_ranks


def never():
    """Nobody asks for a stop."""
    return False


class State:
    """Stands for the weights: what is in them follows from the step."""

    step = 0

    def save(self, store):
        store.save(self.step, _state(self.step), {"step": self.step, "model": {"width": 4}}, {"kind": "test"})


class Talk:
    """What is reported."""

    def __init__(self):
        self.said, self.notes = [], []

    def message(self, text):
        if dist.get_rank() == 0:
            self.said.append(text)

    warning = message

    def note(self, name, value):
        self.notes.append((name, value))

    def interval(self):
        pass

    def untimed(self):
        return contextlib.nullcontext()


class Session:
    """A run of this rank whose steps do nothing but save."""

    def __init__(self, root, **options):
        from llada_megatron.parallel.training import saving

        settings = CheckpointConfig(**{"interval": 1, "keep_last": 2, **options})
        run = SimpleNamespace(output_dir=str(root / "run"), checkpoint=settings)  # all that is asked of a run
        self.state, self.talk = State(), Talk()
        self.store = saving.open_store(run)
        self.store._report = self.talk.said.append
        resumed = self.store.latest()
        if resumed is not None:
            loaded, metadata = self.store.load(resumed, _state(0), {"width": 4})
            _check(loaded, metadata["step"])
            self.state.step = metadata["step"]
        self.resumed = resumed
        self.saver = saving.Saver(run, self.store, self.talk, resumed, self.state.step)

    def run(self, steps):
        for step in steps:
            self.state.step = step
            self.saver.poll()
            self.saver.save(self.state)

    def copied(self):
        """Wait for what is being copied, as many steps would."""
        deadline = time.monotonic() + 60
        while self.saver._copies.protected:
            assert time.monotonic() < deadline
            self.saver.poll()
            time.sleep(0.02)


def _fill_disk():
    """From now on the small files of rank 0 do not fit, until what is returned is called."""

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    real, manifests.write_durably = manifests.write_durably, full
    return lambda: setattr(manifests, "write_durably", real)


def _fail_some(root, asynchronous):
    session = Session(root, max_failures=2, asynchronous=asynchronous)
    session.run([1])
    session.saver.finish()
    mend = _fill_disk()
    session.run([2])
    session.saver.finish()
    mend()
    session.run([3])
    session.saver.finish()
    mend = _fill_disk()
    session.run([4])
    session.saver.finish()
    error = None
    try:
        session.run([5])
        session.saver.finish()
    except ResourceError as caught:
        error = str(caught)
    mend()
    return error, session.talk.said


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in the background"])
def test_training_outlives_failed_saves_but_not_too_many_in_a_row(tmp_path, asynchronous):
    (error, said), (other, silent) = run_ranks(_fail_some, 2, tmp_path, asynchronous)
    assert error == other and silent == []
    assert "2 checkpoints in a row could not be saved" in error and "No space left on device" in error
    failed = [text for text in said if "failure 1 of 2 in a row" in text]
    assert len(failed) == 2 and "no checkpoint of step 2" in failed[0] and "no checkpoint of step 4" in failed[1]
    assert [text for text in said if "training paused" in text][-1].startswith("saved step 3, training paused 0.")
    assert names(tmp_path / "run/checkpoints") == ["latest", "step-00000001", "step-00000003"]


def _fail_the_last(root):
    session = Session(root)
    session.run([1])
    session.state.step = 2
    mend = _fill_disk()
    session.run([2])  # tolerated, and tried again at the end
    try:
        session.saver.end(session.state, never)
    except LladaError as error:
        first = type(error).__name__
    mend()
    session.saver.end(session.state, never)
    return first, session.saver.saved_step


def test_the_last_save_of_a_run_must_succeed_and_is_tried_again(tmp_path):
    assert run_ranks(_fail_the_last, 1, tmp_path) == [("ResourceError", 2)]
    assert names(tmp_path / "run/checkpoints") == ["latest", "step-00000001", "step-00000002"]


def _time_saves(root, asynchronous):
    session = Session(root, asynchronous=asynchronous)
    session.run([1, 2])
    session.saver.finish()
    return session.talk.notes


@pytest.mark.parametrize("asynchronous", [False, True], ids=["at once", "in the background"])
def test_every_save_tells_once_what_it_took_from_training(tmp_path, asynchronous):
    for notes in run_ranks(_time_saves, 2, tmp_path, asynchronous):
        assert [name for name, _ in notes] == ["checkpoint/seconds_lost"] * 2
        assert all(0 < seconds < 60 for _, seconds in notes)


def _train_on(root, steps, options):
    session = Session(root, **options)
    session.run(steps)
    session.saver.end(session.state, never)
    return session.talk.said


def test_multiples_stay_for_ever_here_and_in_the_copy(tmp_path):
    run_ranks(_train_on, 1, tmp_path, range(1, 8), {"keep_last": 2, "keep_every": 3})
    stay = ["latest", "step-00000003", "step-00000006", "step-00000007"]
    assert names(tmp_path / "run/checkpoints") == stay


def _copy_each(root):
    session = Session(root, copy_to=root / "copy", keep_every=2)
    for step in range(1, 6):
        session.run([step])
        session.copied()
    session.saver.end(session.state, never)
    return session.talk.said


def test_copies_are_whole_and_follow_the_same_rules(tmp_path):
    run_ranks(_copy_each, 2, tmp_path)
    own, copy = tmp_path / "run/checkpoints", tmp_path / "copy"
    assert names(copy) == names(own) == ["latest", *(f"step-0000000{step}" for step in (2, 4, 5))]
    assert (copy / "latest").read_text() == "step-00000005\n"
    for step in copy.glob("step-*"):
        manifest = manifests.read(step)
        manifests.verify_sizes(step, manifest)
        assert not any(manifests.verify_digest(step, name, stated) for name, stated in manifest.files.items())
        assert (step / "manifest.json").read_bytes() == (own / step.name / "manifest.json").read_bytes()


def _resume(root):
    session = Session(root, copy_to=root / "copy", keep_last=9)
    session.saver.end(session.state, never)
    return session.resumed, session.talk.said


def test_the_newest_whole_one_of_both_places_is_resumed(tmp_path):
    own, copy = tmp_path / "run/checkpoints", tmp_path / "copy"
    run_ranks(_train_on, 2, tmp_path, [1, 2], {"copy_to": copy, "keep_last": 9})
    assert run_ranks(_resume, 2, tmp_path)[0][0] == own / "step-00000002"
    _damage(own, 2, "__0_0.distcp", _flip)
    path, said = run_ranks(_resume, 2, tmp_path)[0]
    assert path == copy / "step-00000002" and "skipped a damaged checkpoint" in said[0]
    _damage(copy, 2, "__1_0.distcp", _flip)
    assert run_ranks(_resume, 1, tmp_path)[0][0] == own / "step-00000001"
    shutil.rmtree(own)
    assert run_ranks(_resume, 1, tmp_path)[0][0] == copy / "step-00000001"


def _break_off(root):
    """A copy that takes for ever is waited for until the run is asked to stop."""
    from llada_megatron.parallel.checkpoint import copies

    real = copies._start_copier

    copies._start_copier = lambda order: subprocess.Popen(["sleep", "60"], stdout=subprocess.PIPE)
    session = Session(root, copy_to=root / "copy")
    session.run([1])
    copier = session.saver._copies._copier
    session.run([2, 3])
    asked = iter([False, False, dist.get_rank() == 1])  # while it waits, and of one rank only
    session.saver.end(session.state, lambda: next(asked))
    copies._start_copier = real
    return copier.poll(), session.talk.said


def test_a_run_that_is_stopped_leaves_the_copy_to_the_next_start(tmp_path):
    (code, said), _ = run_ranks(_break_off, 2, tmp_path)
    assert code == -signal.SIGKILL and names(tmp_path / "copy") == []
    assert any("step-00000002 is not copied" in text and "slower than saving" in text for text in said)
    # what was being copied was not removed meanwhile, although keep_last is 2
    assert names(tmp_path / "run/checkpoints") == ["latest", *(f"step-0000000{step}" for step in (1, 2, 3))]
    run_ranks(_resume, 1, tmp_path)
    assert names(tmp_path / "copy") == ["latest", "step-00000003"]


def _copy_to_nowhere(root):
    session = Session(root, copy_to=root / "file" / "copy")
    session.run([1, 2])
    session.saver.end(session.state, never)
    return session.talk.said


def test_a_copy_that_fails_is_reported_and_training_goes_on(tmp_path):
    (tmp_path / "file").touch()
    said, _ = run_ranks(_copy_to_nowhere, 2, tmp_path)
    assert sum("could not be copied" in text and "Not a directory" in text for text in said) == 2
    assert names(tmp_path / "run/checkpoints") == ["latest", "step-00000001", "step-00000002"]


def test_bytes_that_change_on_the_way_are_found(tmp_path):
    for folder in ("from", "to"):
        (tmp_path / folder).mkdir()
    (tmp_path / "from/file").write_bytes(b"abc")
    stated = manifests.record(tmp_path / "from/file")
    assert copy_files(tmp_path / "from", tmp_path / "to", {"file": stated}) is None
    (tmp_path / "from/file").write_bytes(b"abd")
    fault = copy_files(tmp_path / "from", tmp_path / "to", {"file": stated})
    assert "SHA-256 differs" in fault
    assert "No such file" in copy_files(tmp_path / "from", tmp_path / "to", {"other": stated})
