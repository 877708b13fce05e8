"""A watcher on the same machine sees what each rank does and since when."""

from __future__ import annotations

import time

from llada_megatron.parallel.training.heartbeat import (
    FOLDER_VARIABLE,
    PHASES,
    Heartbeat,
    HeartbeatRecord,
    read_heartbeats,
)


def test_the_last_beat_of_each_rank_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "beats"))
    hearts = [Heartbeat.of_rank(rank) for rank in (0, 11)]
    assert read_heartbeats(tmp_path / "beats") == {}  # nobody has begun
    before = time.monotonic()
    for step, phase in enumerate(PHASES):
        hearts[1].beat(step, phase)
    hearts[0].beat(3, "load")
    beats = read_heartbeats(tmp_path / "beats")
    assert {rank: (beat.step, beat.phase) for rank, beat in beats.items()} == {0: (3, "load"), 11: (5, "done")}
    assert before <= beats[11].at <= beats[0].at <= time.monotonic()
    assert isinstance(beats[0], HeartbeatRecord)


def test_nothing_is_written_where_nobody_watches(tmp_path, monkeypatch):
    monkeypatch.delenv(FOLDER_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    Heartbeat.of_rank(0).beat(1, "step")
    assert list(tmp_path.iterdir()) == []
