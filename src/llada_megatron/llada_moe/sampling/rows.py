"""The names of rows of logits."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Which rows of logits are read; each int64 `[rows]`, on the host."""

    slot: Tensor
    position: Tensor
    stream: Tensor
    step: Tensor
    """Steps that the sequence has taken: with `stream` and `position` the name of a random draw."""
    current: Tensor
    """The token that stands there."""
