"""What the reading of logits keeps from step to step, and its random draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling.token_buffer import LogitRows


class StepCache:
    """Values of the rows that were read last, found again by the same sequence's row of the same position.

    A row is found only if its sequence has taken exactly one step since: what a finished sequence left in a slot is
    nobody's, and memory is that of one reading.
    """

    def __init__(self) -> None:
        self._keys: Tensor | None = None

    def remember(self, rows: LogitRows, *values: Tensor) -> None:
        """Replace what is remembered by values `[rows, ...]` of these rows."""
        key = _keys(rows)
        self._order = key.argsort()
        self._keys = key[self._order]
        self._stream, self._step = rows.stream, rows.step
        self._values = values

    def recall(self, rows: LogitRows) -> tuple[Tensor, list[Tensor]]:
        """Which rows are found, bool `[rows]` on the host, and their values; those of others are any row's.

        The values are an empty list before the first reading.
        """
        if self._keys is None or not self._keys.numel():
            return torch.zeros_like(rows.slot, dtype=torch.bool), []
        key = _keys(rows)
        place = torch.searchsorted(self._keys, key).clamp(max=self._keys.numel() - 1)
        before = self._order[place]
        found = (self._keys[place] == key) & (self._stream[before] == rows.stream)
        found &= self._step[before] + 1 == rows.step
        return found, [value[before.to(value.device)] for value in self._values]


def _keys(rows: LogitRows) -> Tensor:
    return (rows.slot << 32) + rows.position


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)

_FIRST = 0xBF58476D1CE4E5B9 - (1 << 64)

_SECOND = 0x94D049BB133111EB - (1 << 64)

REMASKING, TOKEN, GAP = range(3)
"""Purposes: streams that never share a draw."""


def uniform(seed: int, purpose: int, *counters: Tensor) -> Tensor:
    """Draws of U(0, 1), float64, one for each element of the broadcast int64 `counters`.

    The mixing is that of splitmix64 (Steele, Lea, Flood 2014), applied once per counter; int64 arithmetic wraps.
    """
    state = torch.tensor(seed & (1 << 63) - 1, dtype=torch.int64, device=counters[0].device)
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


@dataclass(frozen=True)
class Credit:
    """Settings; credits of a row are those of its position since its block began."""

    alpha: float
    """Logits rise by alpha * log(1 + credit)."""
    beta: float
    """What is left of a credit after a step."""
    gamma: float
    """In each step a row's likeliest token gains its probability ** gamma."""


class CreditAccount:
    """The credits of the rows that are being read.

    Of each row only the tokens that ever gained are kept, at most one for each step, and not one number per token of
    the vocabulary. Every shard keeps all of them: they follow from what all shards learn of a row.
    """

    def __init__(self, settings: Credit) -> None:
        self._settings = settings
        self._entries = StepCache()

    def raised(self, logits: Tensor, first_id: int, rows: LogitRows, token: Tensor, probability: Tensor) -> Tensor:
        """Book a step, and raise the logits of this shard.

        Args:
            logits: `[rows, vocab / shards]`.
            first_id: of this shard.
            rows: names of the rows.
            token: the likeliest token of each row over all shards, int64 `[rows]`.
            probability: its probability, `[rows]`.

        Returns:
            `[rows, vocab / shards]`.
        """
        tokens, credits = token[:, None], (probability**self._settings.gamma)[:, None]
        found, earlier = self._entries.recall(rows)
        if earlier:
            old = (earlier[1] * self._settings.beta).masked_fill(~found.to(logits.device)[:, None], 0.0)
            again = (earlier[0] == tokens) & (old > 0)
            once = again.any(1, keepdim=True)
            credits = torch.cat([old + credits.where(again, 0.0), credits.masked_fill(once, 0.0)], 1)
            tokens = torch.cat([earlier[0], tokens], 1)
            used = credits.any(0)
            tokens, credits = tokens[:, used], credits[:, used]
        self._entries.remember(rows, tokens, credits)
        gain = self._settings.alpha * credits.log1p()
        own = tokens - first_id
        inside = (own >= 0) & (own < logits.shape[1])
        own = own.clamp(0, logits.shape[1] - 1)
        higher = (logits.gather(1, own) + gain).masked_fill(~inside, -torch.inf)
        return logits.scatter_reduce(1, own, higher, "amax")  # a token without credit may stand there twice
