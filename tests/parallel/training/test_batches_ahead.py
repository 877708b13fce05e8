"""Batches made a step ahead are those of their step, whatever is asked for, and their errors are raised by the step."""

from __future__ import annotations

import threading
import time

import pytest

from llada_megatron.llada_moe.errors import DataError
from llada_megatron.parallel.training import batches_ahead
from llada_megatron.parallel.training.batches_ahead import BatchesAhead


class Made:
    """Says which steps were made, and in which thread."""

    def __init__(self):
        self.steps, self.threads = [], []

    def __call__(self, step):
        self.steps.append(step)
        self.threads.append(threading.current_thread())
        return f"batches of {step}"


def test_each_step_is_made_once_while_the_one_before_it_runs():
    made = Made()
    ahead = BatchesAhead(made, 3)
    assert [ahead(step) for step in range(3)] == [f"batches of {step}" for step in range(3)]
    ahead.close()
    assert made.steps == [0, 1, 2]  # and none after the last
    assert [thread is threading.current_thread() for thread in made.threads] == [True, False, False]


def test_the_next_step_is_made_before_it_is_asked_for():
    begun, go_on = threading.Event(), threading.Event()

    def make(step):
        if step == 1:
            begun.set()
            assert go_on.wait(60)
        return step

    ahead = BatchesAhead(make, 2)
    assert ahead(0) == 0
    assert begun.wait(60)  # while nobody asks
    go_on.set()
    assert ahead(1) == 1


def test_a_step_run_again_one_left_out_and_one_gone_back_to_get_their_own():
    made = Made()
    ahead = BatchesAhead(made, 100)
    asked = [0, 0, 1, 3, 4, 2, 3]  # again; 2 left out; back to 2
    assert [ahead(step) for step in asked] == [f"batches of {step}" for step in asked]
    ahead.close()
    assert made.steps[:2] == [0, 1]
    assert made.steps.count(0) == 1


def test_an_error_is_the_steps_and_not_the_threads():
    def make(step):
        if step == 1:
            raise DataError("set.bin: ends after 7 tokens; prepare it again")
        return step

    ahead = BatchesAhead(make, 3)
    assert ahead(0) == 0
    with pytest.raises(DataError, match=r"set\.bin: ends after 7 tokens; prepare it again"):
        ahead(1)
    with pytest.raises(DataError):  # a second try is one
        ahead(1)
    assert ahead(2) == 2


def test_closing_waits_for_the_thread_but_not_for_ever(monkeypatch):
    monkeypatch.setattr(batches_ahead, "CLOSE_S", 0.01)
    go_on = threading.Event()
    ahead = BatchesAhead(lambda step: step and go_on.wait(60), 2)
    ahead(0)
    ahead.close()
    thread = ahead._thread
    assert thread.is_alive() and thread.daemon
    go_on.set()
    thread.join(60)
    assert not thread.is_alive()


def test_a_step_that_nobody_wants_is_finished_before_another_is_made():
    at_once, most = [], []

    def make(step):
        at_once.append(step)
        most.append(len(at_once))
        time.sleep(0.02)
        at_once.remove(step)
        return step

    ahead = BatchesAhead(make, 100)
    assert [ahead(step) for step in (0, 5, 2, 9)] == [0, 5, 2, 9]
    ahead.close()
    assert max(most) == 1
