"""What a run shows on stderr: a bar on a terminal, plain lines elsewhere, nothing from other ranks."""

from __future__ import annotations

import io

import pytest

from llada_megatron.parallel.training.progress import TrainingProgress, format_seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")


def test_a_pipe_gets_plain_lines_with_loss_speed_and_time_left():
    stream = io.StringIO()
    with TrainingProgress(4, stream=stream, line_seconds=0) as progress:
        progress.update(2, loss=1.25, tokens_per_second=12345.6, utilization="41% of 134 GFLOP/s")
        progress.update(4, loss=1.0)
    first, last = stream.getvalue().splitlines()
    assert first.startswith("step 2/4  loss 1.2500  12,346 tokens/s  41% of 134 GFLOP/s  ") and first.endswith(" left")
    assert last.startswith("step 4/4") and "\x1b" not in stream.getvalue()


def test_plain_lines_keep_their_distance_but_the_last_step_always_shows():
    stream = io.StringIO()
    with TrainingProgress(10, stream=stream, line_seconds=3600) as progress:
        for step in range(1, 11):
            progress.update(step)
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/10", "10/10"]


def test_a_terminal_gets_a_live_bar_and_messages_above_it():
    stream = Terminal()
    with TrainingProgress(4, stream=stream) as progress:
        progress.update(4, loss=2.0, tokens_per_second=10)
        progress.message("checkpoint [step-4] written")
    text = stream.getvalue()
    assert "4/4" in text and "loss 2.0000" in text and "checkpoint [step-4] written" in text
    assert "\x1b[3" in text


def test_no_color_takes_the_colours_away(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    with TrainingProgress(4, stream=stream) as progress:
        progress.update(2, loss=2.0)
    assert "2/4" in stream.getvalue() and "\x1b[3" not in stream.getvalue()


def test_other_ranks_show_nothing():
    for stream in (io.StringIO(), Terminal()):
        with TrainingProgress(4, rank=1, stream=stream) as progress:
            progress.update(4, loss=2.0)
            progress.message("text")
        assert stream.getvalue() == ""


def test_the_default_stream_is_stderr(capsys):
    with TrainingProgress(1) as progress:
        progress.update(1, loss=1.0)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("step 1/1")


def test_time_left_counts_from_the_step_a_run_resumed_at(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    progress = TrainingProgress(30, start=10, stream=io.StringIO())
    assert progress.seconds_left() is None
    now[0] = 20.0
    progress.update(20)
    assert progress.seconds_left() == 20.0


def test_durations():
    assert [format_seconds(s) for s in (5, 65, 3725)] == ["0:05", "1:05", "1:02:05"]
