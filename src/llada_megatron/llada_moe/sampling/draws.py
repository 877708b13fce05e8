"""Counter-based random draws for sampling: a pure function of who draws, wherever and with whomever it runs.

A draw is a hash of (seed, purpose, sequence, step, position, id): a sequence is sampled the same alone or in a batch,
and every shard of the vocabulary can compute its own part of the noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)

_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)

_SECOND = 0x94D049BB133111EB - (1 << 64)

REMASKING, TOKEN, GAP, MASK_COUNT, MASK_PLACE = range(5)
"""Purposes of random draws; two purposes never share a draw."""


def uniform(seed: int, purpose: int, *counters: Tensor) -> Tensor:
    """Draws of U(0, 1), float64, one for each element of the broadcast int64 `counters`.

    The mixing is that of splitmix64 (Steele, Lea, Flood 2014), applied once per counter; int64 arithmetic wraps.
    """
    state = torch.full((), seed & (1 << 63) - 1, dtype=torch.int64, device=counters[0].device)
    for counter in (torch.full_like(state, purpose), *counters):
        state = _mix((state ^ _mix(counter.to(torch.int64))) + _GOLDEN)
    return (_shift(state, 11).to(torch.float64) + 0.5) * 2.0**-53


def gumbel(seed: int, purpose: int, *counters: Tensor) -> Tensor:
    """Standard Gumbel draws, float64: argmax(logits + temperature * gumbel) samples softmax(logits / temperature)."""
    return -(-uniform(seed, purpose, *counters).log()).log()


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * _FIRST
    x = (x ^ _shift(x, 27)) * _SECOND
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Right shift that brings in zeros (torch's own keeps the sign)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
