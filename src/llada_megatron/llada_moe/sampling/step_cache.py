"""What the reading of one step leaves for that of the next, row by row, and the credit that is computed from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llada_megatron.llada_moe.model.transfer import to_device
from llada_megatron.llada_moe.sampling.token_buffer import LogitRows


class StepCache:
    """Values of the rows of the last step, to be found again in the next one by slot and position.

    A row is found only if it belongs to the same sequence and the sequence has taken exactly one step since. So the
    next sequence in a slot never finds what a finished one left there, and only one step is kept in memory.
    """

    def __init__(self) -> None:
        self._keys: Tensor | None = None

    def remember(self, rows: LogitRows, *values: Tensor) -> None:
        """Keep the values `[rows, ...]` of these rows, in the place of the earlier ones."""
        key = _keys(rows)
        self._order = key.argsort()
        self._keys = key[self._order]
        self._stream, self._step = rows.stream, rows.step
        self._values = values

    def recall(self, rows: LogitRows) -> tuple[Tensor, list[Tensor]]:
        """Which rows are found, bool `[rows]` on the host, and their values `[rows, ...]`.

        Values of rows that are not found are arbitrary. Before anything is kept, the list of values is empty.
        """
        if self._keys is None or not self._keys.numel():
            return torch.zeros_like(rows.slot, dtype=torch.bool), []
        key = _keys(rows)
        nearest = torch.searchsorted(self._keys, key).clamp(max=self._keys.numel() - 1)
        before = self._order[nearest]
        found = (self._keys[nearest] == key) & (self._stream[before] == rows.stream)
        found &= self._step[before] + 1 == rows.step
        return found, [value[to_device(before, value.device)] for value in self._values]


def _keys(rows: LogitRows) -> Tensor:
    return (rows.slot << 32) + rows.position


@dataclass(frozen=True)
class Credit:
    """Settings of credit (dInfer, arXiv 2510.08666), which tokens of a position gain while its block is sampled."""

    alpha: float
    """Logits rise by alpha * log(1 + credit)."""
    beta: float
    """Factor by which a credit decays in each step."""
    gamma: float
    """In each step the most probable token of a row gains a credit of its probability ** gamma."""


class CreditAccount:
    """The credits of the rows that have logits at present.

    For each row only the tokens that ever gained credit are kept, at most one for each step, instead of one number for
    each token of the vocabulary. Every shard keeps the credits of the whole vocabulary, because they follow from
    statistics that all shards have.
    """

    def __init__(self, settings: Credit) -> None:
        self._settings = settings
        self._step_cache = StepCache()

    def raised(self, logits: Tensor, first_id: int, rows: LogitRows, token: Tensor, probability: Tensor) -> Tensor:
        """Add the credits of a step, and raise the logits of this shard accordingly.

        Args:
            logits: `[rows, vocab / shards]`.
            first_id: first token id of this shard.
            rows: what identifies the rows.
            token: the most probable token of each row over all shards, int64 `[rows]`.
            probability: its probability, `[rows]`.

        Returns:
            the raised logits, `[rows, vocab / shards]`.
        """
        tokens, credits = token[:, None], (probability**self._settings.gamma)[:, None]
        found, earlier = self._step_cache.recall(rows)
        if earlier:
            old = (earlier[1] * self._settings.beta).masked_fill(~to_device(found, logits.device)[:, None], 0.0)
            again = (earlier[0] == tokens) & (old > 0)
            once = again.any(1, keepdim=True)
            credits = torch.cat([old + credits.where(again, 0.0), credits.masked_fill(once, 0.0)], 1)
            tokens = torch.cat([earlier[0], tokens], 1)
            used = credits.any(0).nonzero().flatten()  # waits for the device: how many tokens are kept decides a shape
            tokens, credits = tokens.index_select(1, used), credits.index_select(1, used)
        self._step_cache.remember(rows, tokens, credits)
        gain = self._settings.alpha * credits.log1p()
        own = tokens - first_id
        inside = (own >= 0) & (own < logits.shape[1])
        own = own.clamp(0, logits.shape[1] - 1)
        higher = (logits.gather(1, own) + gain).masked_fill(~inside, -torch.inf)
        return logits.scatter_reduce(1, own, higher, "amax")  # a token may occur twice, the second time without credit
