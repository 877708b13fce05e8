"""Who may attend to whom, as a value.

A pattern is a kind (full or causal) combined with segments: consecutive positions, the documents packed into a window,
that attention does not leave. Segments travel as one host tensor of boundaries: ascending offsets into the flattened
`[batch * seq]`, from 0 to `batch * seq`, with the start of every sequence among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

Kind = Literal["full", "causal"]


@dataclass(frozen=True)
class Segment:
    """Positions [start, stop) of sequence `row`."""

    row: int
    start: int
    stop: int


def whole_sequences(batch: int, seq: int) -> torch.Tensor:
    """Boundaries of windows that hold one document each: `[batch + 1]` int32."""
    return torch.arange(batch + 1, dtype=torch.int32) * seq


def segments(boundaries: torch.Tensor, seq: int) -> list[Segment]:
    """The segments that `boundaries` describe, for sequences of `seq` positions."""
    offsets = boundaries.tolist()
    return [Segment(a // seq, a % seq, a % seq + b - a) for a, b in pairwise(offsets) if b > a]
