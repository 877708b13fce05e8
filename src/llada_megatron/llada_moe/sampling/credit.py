"""Credit: logits that rise for the tokens to which the model keeps (dInfer, arXiv 2510.08666)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling.carried import Carried
from llada_megatron.llada_moe.sampling.rows import Rows


@dataclass(frozen=True)
class Credit:
    """Settings; credits of a row are those of its position since its block began."""

    alpha: float
    """Logits rise by alpha * log(1 + credit)."""
    beta: float
    """What is left of a credit after a step."""
    gamma: float
    """In each step a row's likeliest token gains its probability ** gamma."""


class Account:
    """The credits of the rows that are being read.

    Of each row only the tokens that ever gained are kept, at most one for each step, and not one number per token of
    the vocabulary. Every shard keeps all of them: they follow from what all shards learn of a row.
    """

    def __init__(self, settings: Credit) -> None:
        self._settings = settings
        self._entries = Carried()

    def raised(self, logits: Tensor, first_id: int, rows: Rows, token: Tensor, probability: Tensor) -> Tensor:
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
