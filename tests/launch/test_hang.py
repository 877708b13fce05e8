"""When ranks count as hung: by the median of their steps, and by a wider limit for what is not a step."""

import time

import pytest

from llada_megatron.launch.ranks.hang import HangWatch, StuckRank, suspects
from llada_megatron.llada_moe.config.recovery import RecoveryConfig
from llada_megatron.parallel.training import heartbeat
from llada_megatron.parallel.training.heartbeat import Heartbeat, heartbeat_path

LIMITS = RecoveryConfig(hang_factor=10.0, hang_minimum_s=5.0, hang_other_s=60.0)


def test_limits_follow_the_median_step(tmp_path, monkeypatch):
    clock = [time.monotonic()]
    monkeypatch.setattr(heartbeat.time, "monotonic_ns", lambda: int(clock[0] * 1e9))
    watch = HangWatch(tmp_path, LIMITS, range(2))
    assert watch.hung(clock[0] + 59) == []
    assert [(each.rank, each.phase) for each in watch.hung(clock[0] + 61)] == [(0, "start"), (1, "start")]
    heartbeats = [Heartbeat(heartbeat_path(tmp_path, rank)) for rank in range(2)]

    def beat(step: int, phase: str = "step", ranks: tuple[int, ...] = (0, 1)) -> None:
        for rank in ranks:
            heartbeats[rank].beat(step, phase)
        assert watch.hung(clock[0]) == []

    beat(300, "start")
    clock[0] += 20
    beat(300)
    assert watch.steps == 0
    clock[0] += 40  # the first step is slow, and no median yet
    for step, seconds in [(301, 2), (302, 2), (303, 2)]:
        beat(step)
        clock[0] += seconds
    beat(304, ranks=(0,))
    assert watch.steps == 4
    assert watch.hung(clock[0] + 19) == []  # 10 x the median of 2 s
    stuck = watch.hung(clock[0] + 21)
    assert [(each.rank, each.step) for each in stuck] == [(0, 304), (1, 303)]
    assert [each.rank for each in suspects(stuck, {})] == [1]
    beat(304, "save")
    assert watch.hung(clock[0] + 59) == []
    assert len(watch.hung(clock[0] + 61)) == 2


@pytest.fixture
def beats(tmp_path, monkeypatch):
    """A clock, the watch of two ranks, and a function by which ranks write a heartbeat that the watch sees."""
    clock = [time.monotonic()]
    monkeypatch.setattr(heartbeat.time, "monotonic_ns", lambda: int(clock[0] * 1e9))
    watch = HangWatch(tmp_path, LIMITS, range(2))
    ranks = [Heartbeat(heartbeat_path(tmp_path, rank)) for rank in range(2)]

    def beat(step: int, *phases: str) -> None:
        for rank, phase in zip(ranks, phases, strict=True):
            rank.beat(step, phase)
        assert watch.hung(clock[0]) == []

    return clock, watch, beat


def test_the_limit_follows_the_median_of_unequal_steps_and_not_their_shortest_or_longest(beats):
    clock, watch, beat = beats
    for step, seconds in enumerate([1, 1, 3, 40, 3]):
        beat(step, "step", "step")
        clock[0] += seconds
    beat(5, "step", "step")  # steps of 1, 1, 3, 40 and 3 s: median 3, mean 9.6
    assert watch.hung(clock[0] + 29) == []
    assert len(watch.hung(clock[0] + 31)) == 2


def test_the_first_steps_have_the_wide_limit_however_short_they_are(beats):
    clock, watch, beat = beats
    for step in range(3):
        beat(step, "step", "step")
        clock[0] += 2
    clock[0] -= 2
    assert watch.steps == 2
    assert watch.hung(clock[0] + 59) == []
    clock[0] += 2
    beat(3, "step", "step")
    assert len(watch.hung(clock[0] + 21)) == 2


@pytest.mark.parametrize("phases", [("save", "step"), ("step", "save")])
def test_a_rank_that_saves_while_another_is_in_a_step_has_the_limit_of_a_save(beats, phases):
    clock, watch, beat = beats
    for step in range(5):
        beat(step, "step", "step")
        clock[0] += 2
    beat(5, *phases)
    assert watch.hung(clock[0] + 59) == []  # 10 steps would be 20 s
    assert len(watch.hung(clock[0] + 61)) == 2


def test_a_watcher_that_was_suspended_itself_starts_anew(tmp_path):
    """So was the whole job: the hour that has passed says nothing about the ranks."""
    watch, began = HangWatch(tmp_path, LIMITS, range(2)), time.monotonic()
    assert watch.hung(began + 10) == []
    assert watch.hung(began + 3600) == []
    assert watch.hung(began + 3600 + 59) == []
    assert len(watch.hung(began + 3600 + 61)) == 2


def test_a_stopped_process_is_the_suspect():
    stuck = [StuckRank(0, 7, "step", 9.0), StuckRank(1, 7, "step", 9.0)]
    assert suspects(stuck, {0: "sleeping", 1: "stopped"}) == [stuck[1]]
    assert suspects(stuck, {}) == stuck
