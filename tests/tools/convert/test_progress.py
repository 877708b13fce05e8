"""How far a conversion is: a bar where stderr is a terminal, a line now and then where it is not."""

import io
import sys

import pytest

from llada_megatron.tools.convert import tasks


class Terminal(io.StringIO):
    """What takes itself for a terminal."""

    def isatty(self):
        return True


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with tasks.progress_bar("importing", 4 * 10**9) as show:
        show(10**9)
        show(3 * 10**9)
    written = sys.stderr.getvalue()
    assert "importing" in written and "4.0/4.0 GB" in written
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1  # the cursor comes back


def test_a_bar_ends_with_an_interruption(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(KeyboardInterrupt), tasks.progress_bar("importing", 100) as show:
        show(50)
        raise KeyboardInterrupt
    assert sys.stderr.getvalue().count("\x1b[?25h") == 1


def test_lines_elsewhere(monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(tasks.time, "monotonic", lambda: now)
    with tasks.progress_bar("exporting", 8 * 10**9) as show:
        show(10**9)
        assert capsys.readouterr().err == ""
        now = 31.0
        show(10**9)
        show(10**9)
    assert capsys.readouterr().err == "exporting: 2.0 of 8.0 GB\n"
