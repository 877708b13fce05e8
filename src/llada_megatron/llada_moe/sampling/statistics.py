"""What a sampler needs to know of a row of logits: a token, and how sure the model is of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling import draws


@dataclass(frozen=True)
class Statistics:
    """Per row."""

    token: Tensor
    """[rows] int64: the most probable token, or the one drawn at a temperature."""
    confidence: Tensor
    """[rows] float32: its probability under the model (without temperature)."""


@dataclass(frozen=True)
class RowNames:
    """Who the rows are, for their random draws; each int64 `[rows]`."""

    stream: Tensor
    step: Tensor
    position: Tensor


def row_statistics(
    logits: Tensor, excluded: Sequence[int], temperature: float, seed: int, names: RowNames
) -> Statistics:
    """Choose a token for each row and say its probability.

    Args:
        logits: `[rows, vocab]`.
        excluded: ids that are never chosen and take no probability (the mask token; end of text when infilling).
        temperature: 0 = the most probable token, the lowest id among equals; above 0 Gumbel-max sampling, in float64.
        seed: of the draws.
        names: coordinates of the draws.
    """
    logits = logits.float().clone()
    logits[:, list(excluded)] = -torch.inf
    scores: Tensor = logits
    if temperature > 0:
        ids = torch.arange(logits.shape[1], device=logits.device)
        noise = draws.gumbel(
            seed, draws.TOKEN, names.stream[:, None], names.step[:, None], names.position[:, None], ids
        )
        scores = logits.double() + temperature * noise
    token = scores.argmax(-1)
    chosen = logits.gather(1, token[:, None]).squeeze(1)
    return Statistics(token, (chosen - logits.logsumexp(-1)).exp())
