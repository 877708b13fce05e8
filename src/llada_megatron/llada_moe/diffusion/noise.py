"""The forward process: which positions of a sequence are masked, as a pure function of its coordinates.

A draw is one word of numpy's Philox4x64-10, a counter-based generator whose raw output numpy keeps stable: the key is
(seed, set), the counter (block, purpose, pass, window), and position i takes word i. Every rank, restart and layout
therefore sees the same mask without a message, and a sequence's mask does not depend on the rest of its batch.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from llada_megatron.llada_moe.config.editing import EditingConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.data.packing import permute

_TIME, _MASK, _LENGTH, _STRATUM, _REPLACED, _SUBSTITUTE, _ORDER = range(7)
_EDITED, _MISSING, _SURPLUS, _ADDITION, _DRAFTED = range(7, 12)
"""Purposes: streams that never share a draw."""
_Ratios = TypeVar("_Ratios", float, NDArray[np.float64])
_SPLITS = {"train": 0, "validation": 1}


@dataclass(frozen=True)
class SampleCoordinates:
    """Where a training sample comes from; together with the seed they determine its noise."""

    number: int
    """Global sample number n (read by stratified times only)."""
    set: int
    epoch: int
    """The pass over the set: another pass draws another mask."""
    window: int
    inverse: bool = False
    """Whether it has the inverse of the mask that these coordinates give, in a pair of complementary masks."""


@dataclass(frozen=True)
class Replacement:
    """Which tokens of a sequence are shown as others."""

    replaced: NDArray[np.bool_]
    """[seq], True = another token is shown; none is masked."""
    choice: NDArray[np.float64]
    """[seq], draws of U[0, 1): which one (read by `ReplacementVocabulary.other`)."""
    drafted: bool = False
    """Whether the others are the model's own predictions."""


@dataclass(frozen=True)
class Moves:
    """Where the draft of a sequence has tokens too few or too many (read by `edit_script.arrange`)."""

    missing: NDArray[np.bool_]
    """[seq], True = the token is left out."""
    surplus: NDArray[np.bool_]
    """[seq], True = another token is put before this one."""
    choice: NDArray[np.float64]
    """[seq], draws of U[0, 1): which one."""


@dataclass(frozen=True)
class Corruption:
    """One sequence's noise."""

    mask: NDArray[np.bool_]
    """[seq], True = masked."""
    ratio: float
    """p, the probability with which each untruncated position was masked; with one for each block, their mean over the
    positions."""
    length: int
    """Untruncated positions. Those from here on are cut off: not masked, not supervised, and not seen by the others."""
    replacement: Replacement | None = None
    """None = every token that is not masked is shown as it is."""
    ratios: NDArray[np.float64] | None = None
    """[seq], p of each position where blocks have their own; None = `ratio` everywhere."""
    moves: Moves | None = None
    """None = every token is shown at its place."""


class ForwardProcess:
    """Masks each token with probability p = (1 - epsilon) t + epsilon, t ~ U[mask_ratio_min, mask_ratio_max).

    Published form: P8B and its GUIDELINES (epsilon 1e-3, t over [0, 1), 1 % of the sequences cut to a length from
    U{1..seq}); the band on t is LLaDA2's. A sequence may come out without a masked token, as in the published code.
    With a replace ratio, each untruncated token that is not masked is replaced with that probability (T2T of LLaDA2.1);
    with `editing`, so it is in a share of the sequences, whose blocks may also lose and gain tokens (LLaDA2.2).
    """

    def __init__(
        self,
        objective: ObjectiveConfig,
        seed: int,
        global_batch_size: int,
        split: str = "train",
        editing: EditingConfig | None = None,
    ) -> None:
        """Validation measures the bound itself: the whole range of t, stratified; nothing is cut, replaced or moved.

        With complementary masks a number stands for a pair of samples, of which a global batch has half as many, and
        p = (1 - epsilon) t + epsilon / 2, so that p and 1 - p have one range.
        """
        self._seed, self._split = seed & (1 << 64) - 1, _SPLITS[split]
        training = split == "train"
        self._band = (objective.mask_ratio_min, objective.mask_ratio_max) if training else (0.0, 1.0)
        pairs = training and objective.complementary_masks
        self._epsilon, self._least = objective.epsilon, objective.epsilon / 2 if pairs else objective.epsilon
        numbers = global_batch_size // 2 if pairs else global_batch_size
        self._strata = 1 if training and objective.time_sampling == "uniform" else numbers
        self._cut_probability = objective.random_length_probability if training else 0.0
        self._editing = editing if training else None
        self._replace_ratio = objective.replace_ratio if training else 0.0

    def corrupt(
        self,
        at: SampleCoordinates,
        length: int,
        blocks: NDArray[np.int64] | None = None,
        words: NDArray[np.int64] | None = None,
    ) -> Corruption:
        """The noise of one sequence of `length` tokens.

        `blocks`: `[seq]`, ascending numbers from 0 of the blocks that each have their own t; None = one t for all.
        `words`: `[seq]`, first position of each token's word, whose tokens are masked together; None = each by itself.
        """
        ratios = self.mask_ratio(at) if blocks is None else self.mask_ratios(at, int(blocks[-1]) + 1)[blocks]
        mask, ratios = self.masks(at, length, ratios)
        if words is not None:
            mask = mask[words]
        untruncated = self._length(at, length)
        mask[untruncated:] = False
        replacement, moves = self._replacement(at, mask, untruncated), self._moves(at, length)
        if isinstance(ratios, float):
            return Corruption(mask, ratios, untruncated, replacement, None, moves)
        return Corruption(mask, float(ratios.mean()), untruncated, replacement, ratios, moves)

    def masks(self, at: SampleCoordinates, length: int, ratios: _Ratios) -> tuple[NDArray[np.bool_], _Ratios]:
        """Which of `length` positions are masked where `ratios`, one p or `[seq]`, are drawn for these coordinates, and
        the p of each: the second sample of a pair has the masks that the first has not, and 1 - p."""
        drawn = self._uniform(_MASK, at, length) < ratios
        return (~drawn, 1.0 - ratios) if at.inverse else (drawn, ratios)

    def mask_ratio(self, at: SampleCoordinates) -> float:
        """p that is drawn for one sequence, or for the first of a pair."""
        t = float(self._uniform(_TIME, at, 1)[0])
        if self._strata > 1:
            t = (self._stratum(at.number) + t) / self._strata
        return self._ratio(t)

    def mask_ratios(self, at: SampleCoordinates, blocks: int) -> NDArray[np.float64]:
        """p that is drawn for each of the `blocks` of a sequence, or of the first of a pair.

        Stratified times are so over all blocks of a global batch (arXiv 2503.09573): [0, 1) has a stratum for each
        block of the sequence, in an order drawn for it, and each of these one for each sequence of the global batch.
        """
        t = self._uniform(_TIME, at, blocks)
        if self._strata > 1:
            t = (self._stratum(at.number) + t) / self._strata
            t = (np.argsort(self._uniform(_ORDER, at, blocks), kind="stable") + t) / blocks
        return self._ratio(t)

    def _ratio(self, t: _Ratios) -> _Ratios:
        """p for times drawn from U[0, 1)."""
        low, high = self._band
        t = low + (high - low) * t
        return (1.0 - self._epsilon) * t + self._least

    def _replacement(self, at: SampleCoordinates, mask: NDArray[np.bool_], untruncated: int) -> Replacement | None:
        ratio, edited, drafted = self._replace_ratio, self._edited(at), False
        if edited is not None:
            drafted = self._drafted(at, edited)
            ratio = edited.draft_ratio if drafted else edited.replace_ratio
        elif ratio <= 0.0:
            return None
        replaced = (self._uniform(_REPLACED, at, len(mask)) < ratio) & ~mask
        replaced[untruncated:] = False
        return Replacement(replaced, self._uniform(_SUBSTITUTE, at, len(mask)), drafted)

    def _moves(self, at: SampleCoordinates, length: int) -> Moves | None:
        edited = self._edited(at)
        if edited is None or not edited.moves or self._drafted(at, edited):
            return None
        missing = self._uniform(_MISSING, at, length) < edited.missing_ratio
        surplus = self._uniform(_SURPLUS, at, length) < edited.surplus_ratio
        return Moves(missing, surplus, self._uniform(_ADDITION, at, length))

    def _edited(self, at: SampleCoordinates) -> EditingConfig | None:
        """What is wrong in a sequence besides its masks; None = nothing. Both samples of a pair have it, or neither."""
        editing = self._editing
        if editing is None or editing.share <= 0.0:
            return None
        return editing if self._uniform(_EDITED, at, 1)[0] < editing.share else None

    def _drafted(self, at: SampleCoordinates, edited: EditingConfig) -> bool:
        return bool(self._uniform(_DRAFTED, at, 1)[0] < edited.draft_share)

    def _stratum(self, number: int) -> int:
        """Which stratum sample n takes: each of its global batch another one, in an order drawn per batch."""
        batch, place = divmod(number, self._strata)
        return permute(place, self._strata, (self._seed, self._split, _STRATUM, batch))

    def _length(self, at: SampleCoordinates, length: int) -> int:
        """Untruncated tokens: all, or with the configured probability a draw from U{1..length}."""
        if self._cut_probability <= 0.0:
            return length
        chance, size = self._uniform(_LENGTH, at, 2)
        return 1 + int(size * length) if chance < self._cut_probability else length

    def _uniform(self, purpose: int, at: SampleCoordinates, count: int) -> NDArray[np.float64]:
        """`count` draws of U[0, 1), multiples of 2^-53."""
        stream = purpose * len(_SPLITS) + self._split
        key = np.array([self._seed, at.set], dtype=np.uint64)
        counter = np.array([0, stream, at.epoch, at.window], dtype=np.uint64)
        words = np.random.Philox(key=key, counter=counter).random_raw(count)
        return (words >> np.uint64(11)) * 2.0**-53


class ReplacementVocabulary:
    """The ids that stand for text: those that take another token's place."""

    def __init__(self, size: int, special: Collection[int]) -> None:
        """All ids below `size` but the special ones. Raises ValueError: fewer than two are left."""
        self._ids = np.setdiff1d(np.arange(size, dtype=np.int64), np.array(sorted(special), dtype=np.int64))
        if len(self._ids) < 2:
            raise ValueError(f"a vocabulary of {size} with {len(special)} special ids has no two ids that are text")

    def other(self, tokens: NDArray[np.int64], choice: NDArray[np.float64]) -> NDArray[np.int64]:
        """A text token other than each token `[seq]`, each equally likely for a `choice` `[seq]` drawn from U[0, 1)."""
        place = np.searchsorted(self._ids, tokens)
        is_word = self._ids[np.minimum(place, len(self._ids) - 1)] == tokens
        number = (choice * (len(self._ids) - is_word)).astype(np.int64)
        return self._ids[number + (is_word & (number >= place))]
