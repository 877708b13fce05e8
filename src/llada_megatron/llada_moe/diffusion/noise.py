"""The forward process: which positions of a sequence are masked, as a pure function of its coordinates.

A draw is one word of numpy's Philox4x64-10, a counter-based generator whose raw output numpy keeps stable: the key is
(seed, set), the counter (block, purpose, pass, window), and position i takes word i. Every rank, restart and layout
therefore sees the same mask without a message, and a sequence's mask does not depend on the rest of its batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.config.schema import ObjectiveConfig
from llada_megatron.llada_moe.data.permutation import permute

_TIME, _MASK, _LENGTH, _STRATUM = range(4)
"""Purposes: streams that never share a draw."""
_SPLITS = {"train": 0, "validation": 1}


@dataclass(frozen=True)
class Coordinates:
    """Where a training sample comes from; together with the seed they determine its noise."""

    number: int
    """Global sample number n (read by stratified times only)."""
    set: int
    epoch: int
    """The pass over the set: another pass draws another mask."""
    window: int


@dataclass(frozen=True)
class Corruption:
    """One sequence's noise."""

    mask: NDArray[np.bool_]
    """[seq], True = masked."""
    ratio: float
    """p, the probability with which each live position was masked."""
    length: int
    """Live positions; those from here on are cut off (neither masked nor supervised, not seen by the live ones)."""


class ForwardProcess:
    """Masks each token with probability p = (1 - epsilon) t + epsilon, t ~ U[mask_ratio_min, mask_ratio_max).

    Published form: P8B and its GUIDELINES (epsilon 1e-3, t over [0, 1), 1 % of the sequences cut to a length from
    U{1..seq}); the band on t is LLaDA2's. A sequence may come out without a masked token, as in the published code.
    """

    def __init__(self, objective: ObjectiveConfig, seed: int, global_batch_size: int, split: str = "train") -> None:
        """Validation measures the bound itself: the whole range of t, stratified, and nothing is cut."""
        self._epsilon = objective.epsilon
        self._seed, self._split = seed & (1 << 64) - 1, _SPLITS[split]
        training = split == "train"
        self._band = (objective.mask_ratio_min, objective.mask_ratio_max) if training else (0.0, 1.0)
        self._strata = 1 if training and objective.time_sampling == "uniform" else global_batch_size
        self._cut_probability = objective.random_length_probability if training else 0.0

    def corrupt(self, at: Coordinates, length: int) -> Corruption:
        """The noise of one sequence of `length` tokens."""
        ratio = self.mask_ratio(at)
        live = self._length(at, length)
        mask = self._uniform(_MASK, at, length) < ratio
        mask[live:] = False
        return Corruption(mask, ratio, live)

    def mask_ratio(self, at: Coordinates) -> float:
        """p of one sequence."""
        t = float(self._uniform(_TIME, at, 1)[0])
        if self._strata > 1:
            t = (self._stratum(at.number) + t) / self._strata
        low, high = self._band
        t = low + (high - low) * t
        return (1.0 - self._epsilon) * t + self._epsilon

    def _stratum(self, number: int) -> int:
        """Which stratum sample n takes: each of its global batch another one, in an order drawn per batch."""
        batch, place = divmod(number, self._strata)
        return permute(place, self._strata, (self._seed, self._split, _STRATUM, batch))

    def _length(self, at: Coordinates, length: int) -> int:
        """Live tokens: all, or with the configured probability a draw from U{1..length}."""
        if self._cut_probability <= 0.0:
            return length
        chance, size = self._uniform(_LENGTH, at, 2)
        return 1 + int(size * length) if chance < self._cut_probability else length

    def _uniform(self, purpose: int, at: Coordinates, count: int) -> NDArray[np.float64]:
        """`count` draws of U[0, 1), multiples of 2^-53."""
        stream = purpose * len(_SPLITS) + self._split
        key = np.array([self._seed, at.set], dtype=np.uint64)
        counter = np.array([0, stream, at.epoch, at.window], dtype=np.uint64)
        words = np.random.Philox(key=key, counter=counter).random_raw(count)
        return (words >> np.uint64(11)) * 2.0**-53
