"""A measured command: its output, its status, memory that is its own; and the memory that is alive at once."""

from __future__ import annotations

import sys

import numpy as np
import torch

from llada_megatron.tools.bench.measurement import peak_bytes, run_command

MIB = 2**20


def test_memory_is_that_of_the_command_and_not_of_the_process_that_measures():
    block = np.ones(10**9, dtype=np.uint8)
    child = run_command([sys.executable, "-c", "block = b'1' * 200_000_000; print('first'); print('last')"])
    assert block.size == 10**9
    assert 0.2 < child.peak_gb < 0.3
    assert (child.output, child.status) == ("first\nlast\n", 0)
    assert child.seconds > 0


def test_a_status_and_a_signal_are_told():
    assert run_command([sys.executable, "-c", "raise SystemExit(3)"]).status == 3
    assert run_command([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]).status == -9


def block(mib):
    return torch.empty(mib * MIB, dtype=torch.uint8)


def test_released_memory_does_not_count_twice():
    def work():
        for _ in range(3):
            block(4)
        both = block(2), block(3)
        del both

    assert 5 * MIB <= peak_bytes(work) < 6 * MIB


def test_what_is_returned_counts():
    assert 4 * MIB <= peak_bytes(lambda: block(4)) < 4.5 * MIB
