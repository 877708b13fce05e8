"""The memory tracker counts what is alive at once."""

from __future__ import annotations

import torch

from llada_megatron.tools.bench.memory import peak_bytes

MIB = 2**20


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
