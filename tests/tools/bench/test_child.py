"""A measured command: its output, its status, and memory that is its own."""

from __future__ import annotations

import sys

import numpy as np

from llada_megatron.tools.bench.child import run_child


def test_memory_is_that_of_the_command_and_not_of_the_process_that_measures():
    block = np.ones(10**9, dtype=np.uint8)
    child = run_child([sys.executable, "-c", "block = b'1' * 200_000_000; print('first'); print('last')"])
    assert block.size == 10**9
    assert 0.2 < child.peak_gb < 0.3
    assert (child.output, child.status) == ("first\nlast\n", 0)
    assert child.seconds > 0


def test_a_status_and_a_signal_are_told():
    assert run_child([sys.executable, "-c", "raise SystemExit(3)"]).status == 3
    assert run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]).status == -9
