"""A random order of n things that needs no table: element i of the permutation is computed from i alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_WORD = (1 << 64) - 1
_ROUNDS = 6


def mix(value: int) -> int:
    """A 64-bit integer hash (the finaliser of SplitMix64: Steele, Lea, Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _WORD
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _WORD
    return value ^ (value >> 31)


def mix_all(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`mix` of every element."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(index: int, size: int, key: tuple[int, ...]) -> int:
    """Element `index` of a permutation of range(size) chosen by `key`.

    A Feistel network over the next even number of bits, walked until it lands inside the range (Black and Rogaway 2002:
    cycle walking); four walks on average at most.
    """
    if not 0 <= index < size:
        raise IndexError(f"{index} is not in range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    state = 0
    for part in key:
        state = mix(state ^ (part & _WORD))
    keys = [mix(state + r) for r in range(_ROUNDS)]
    while True:
        left, right = index >> half, index & low
        for round_key in keys:
            left, right = right, left ^ (mix(round_key ^ right) & low)
        index = left << half | right
        if index < size:
            return index
