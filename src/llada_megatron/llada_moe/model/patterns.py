"""Who may attend to whom, as a value.

An `AttentionPattern` is a value of the step: it says who sees whom inside a segment. Segments are consecutive
positions, the documents packed into a window, that attention does not leave. They travel as one host tensor of
boundaries: ascending offsets into the flattened `[batch * seq]`, from 0 to `batch * seq`, with the start of every
sequence among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from llada_megatron.llada_moe.model.flops import block_causal_keys

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class AttentionPattern:
    """Who sees whom inside a segment. A value of the step: a run may change it, and no module is built for one."""

    block: int | None
    """Length of the blocks that see themselves whole and all before: 1 = causal, None = the segment sees itself."""
    doubled: bool = False
    """The sequence is `[x_t ; x_0]`, as block-diffusion training reads it: a noisy half, then a clean half with the
    same segments. A noisy block sees itself and the clean blocks before it; a clean block sees itself and those before
    it (LLaDA2.0, eq. 3; arXiv 2503.09573). Boundaries name the segments of both halves."""
    causal_clean: bool = False
    """Of the clean half, each position sees itself and those before it, not its whole block: the keys of a clean token
    do not depend on what follows it, so that they are those of decoding token by token."""

    def __post_init__(self) -> None:
        """Raises ValueError for a block without positions, and for a clean half that no query of the other sees."""
        if self.causal_clean and not self.doubled:
            raise ValueError("there is no clean half to be causal: causal attention over a text is blocks of 1")
        if self.block is not None and self.block < 1:
            raise ValueError(f"blocks of {self.block} positions see nothing; 1 is causal attention, None is full")
        if self.doubled and self.block is None:
            raise ValueError("without blocks the noisy half sees nothing of the clean half: leave it out")

    @property
    def copies(self) -> int:
        """How often a sequence of the pattern holds each position of the text."""
        return 2 if self.doubled else 1

    @property
    def clean_block(self) -> int | None:
        """Length of the blocks of the clean half that see themselves whole and all before."""
        return 1 if self.causal_clean else self.block

    def keys_per_query(self, length: int) -> float:
        """Keys that a query of a segment of `length` positions sees on average."""
        seen = block_causal_keys(length, self.block or length)
        return (seen + block_causal_keys(length, 1)) / 2 if self.causal_clean else seen

    def keys_seen(self, stop: int, length: int) -> int:
        """How many keys, from the start of a segment of `length` positions on, its queries [0, stop) see together."""
        return length if self.block is None else min(length, -(-stop // self.block) * self.block)


FULL, CAUSAL = AttentionPattern(None), AttentionPattern(1)


@dataclass(frozen=True)
class Segment:
    """Positions [start, stop) of sequence `row`."""

    row: int
    start: int
    stop: int


def whole_sequences(batch: int, seq: int) -> torch.Tensor:
    """Boundaries of windows that hold one document each: `[batch + 1]` int32."""
    import torch

    return torch.arange(batch + 1, dtype=torch.int32) * seq


def segments(boundaries: torch.Tensor, seq: int) -> list[Segment]:
    """The segments that `boundaries` describe, for sequences of `seq` positions."""
    offsets = boundaries.tolist()
    return [Segment(a // seq, a % seq, a % seq + b - a) for a, b in pairwise(offsets) if b > a]


def block_numbers(boundaries: torch.Tensor, size: int, positions: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Number the blocks of `size` positions, counted from the start of each segment, whose last may be shorter.

    Args:
        boundaries: on the host.
        positions: int64, offsets into the flattened `[batch * seq]`.

    Returns:
        The block of each position, and how many blocks there are.
    """
    starts = boundaries.long()
    blocks = (starts.diff() + size - 1) // size
    import torch

    from llada_megatron.llada_moe.model.transfer import to_device

    first = torch.cat([blocks.new_zeros(1), blocks.cumsum(0)])
    total = int(first[-1])
    starts, first = to_device(starts, positions.device), to_device(first, positions.device)
    segment = torch.searchsorted(starts, positions, right=True) - 1
    return first[segment] + (positions - starts[segment]) // size, total


def begin_blocks(boundaries: torch.Tensor, size: int, positions: torch.Tensor) -> bool:
    """Whether a block, as `block_numbers` counts them, begins at each of `positions`; all on the host."""
    import torch

    starts = boundaries.long()
    segment = torch.searchsorted(starts, positions, right=True) - 1
    return not bool(((positions - starts[segment]) % size).any())


@dataclass(frozen=True)
class Band:
    """Queries [start, stop) of a segment, of one or more blocks, and the keys [0, keys) that they see together.

    `first` is the segment's position at which the band's blocks begin.
    """

    first: int
    start: int
    stop: int
    keys: int


def bands(start: int, stop: int, length: int, block: int, span: int) -> Iterator[Band]:
    """Cut queries [start, stop) of a segment of `length` into bands that begin at multiples of `span`.

    `span` is a multiple of `block`; all positions are counted from the start of the segment.
    """
    while start < stop:
        first = start // span * span
        end = min(stop, first + span)
        yield Band(first, start, end, min(length, -(-end // block) * block))
        start = end
