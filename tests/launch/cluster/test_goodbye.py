"""How long the first node of a job waits for the others once there is a verdict."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from llada_megatron.launch.cluster.agent import job_attempt
from llada_megatron.launch.cluster.agent.job_attempt import JobAttempt
from llada_megatron.launch.cluster.job import Verdict


class Clock:
    """A time that sleeping alone moves, and a store whose keys appear at a time."""

    def __init__(self, keys):
        self.now, self.keys = 0.0, keys

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def check(self, keys):
        return all(self.keys.get(key, 99) <= self.now for key in keys)


@pytest.mark.parametrize(
    ("keys", "lost", "until"),
    [
        ({}, (), 0.0),  # never came
        ({"here/1": 0}, (), job_attempt._GOODBYE_S),
        ({"here/1": 0, "bye/1": 6}, (), 6.0),
        ({"here/1": 0, "bye/1": 2}, ("n1",), 2.0),  # it was late, and lives
        ({"here/1": 0}, ("n1",), job_attempt._GOODBYE_OF_THE_LOST_S),
    ],
)
def test_the_first_node_waits_for_those_that_came(monkeypatch, keys, lost, until):
    clock = Clock(keys)
    monkeypatch.setattr(job_attempt, "time", clock)
    attempt = JobAttempt.__new__(JobAttempt)
    told = []
    attempt.node = SimpleNamespace(
        attempt=0,
        names=lambda: ["n0", "n1"],
        job=SimpleNamespace(write_verdict=lambda *verdict: told.append(verdict)),
        event=lambda name, **facts: None,
        say=lambda text: None,
    )
    attempt.stop, attempt.stop_requested = SimpleNamespace(requested=False), False
    attempt.store, attempt.lost = clock, set(lost)
    attempt.rendezvous = SimpleNamespace(set_closed=lambda: None)
    attempt._end(Verdict("requeue", "a reason"))
    assert told == [(0, Verdict("requeue", "a reason"))] and clock.now == until
