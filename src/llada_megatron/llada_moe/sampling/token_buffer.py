"""What is being written: the tokens of several sequences, the active block of each, and names for rows of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """One sequence to be written, before it has a slot."""

    tokens: Sequence[int]
    """What stands at the open positions is ignored."""
    gaps: Sequence[bool]
    """True = open: to be written. A mask token elsewhere is text like any other."""
    blocks: Sequence[tuple[int, int]]
    """Extents [start, end) that are written one after another; every gap lies in one of them."""
    stream: int
    """Which random draws it uses: its number among all sequences, whatever it runs beside."""
    length: int | None = None
    """Positions of the result; those behind it fill up the last block and are cut off. None = all."""


@dataclass
class TokenBuffer:
    """The slots of a group: each holds one sequence, padded on the right with mask tokens that nothing attends to.

    All tensors are on the host.
    """

    tokens: Tensor
    """[slots, seq] int64; the mask token where open."""
    open: Tensor
    """[slots, seq] bool: still to be written."""
    given: Tensor
    """[slots, seq] bool: not to be changed (the prompt, and what lies behind the sequence)."""
    lengths: Tensor
    """[slots] int64: positions of each sequence."""
    starts: Tensor
    """[slots, blocks] int64: where each block begins; 0 behind the last one."""
    ends: Tensor
    """[slots, blocks] int64."""
    blocks: Tensor
    """[slots] int64: number of blocks."""
    stream: Tensor
    """[slots] int64: which random draws a sequence uses."""
    mask_id: int

    @classmethod
    def empty(cls, slots: int, seq: int, blocks: int, mask_id: int) -> TokenBuffer:
        """Slots for sequences of up to `seq` positions in up to `blocks` blocks."""
        zeros = torch.zeros(slots, dtype=torch.int64)
        return cls(
            tokens=torch.full((slots, seq), mask_id, dtype=torch.int64),
            open=torch.zeros(slots, seq, dtype=torch.bool),
            given=torch.ones(slots, seq, dtype=torch.bool),
            lengths=zeros.clone(),
            starts=torch.zeros(slots, blocks, dtype=torch.int64),
            ends=torch.zeros(slots, blocks, dtype=torch.int64),
            blocks=zeros.clone(),
            stream=zeros.clone(),
            mask_id=mask_id,
        )

    def put(self, slot: int, draft: Request) -> None:
        """Replace what a slot holds.

        Raises:
            ValueError: the draft does not fit, or a gap lies outside of its blocks.
        """
        length, gaps = len(draft.tokens), torch.tensor(draft.gaps, dtype=torch.bool)
        if length > self.tokens.shape[1] or len(draft.blocks) > self.starts.shape[1] or len(gaps) != length:
            raise ValueError(f"a draft of {length} positions in {len(draft.blocks)} blocks does not fit the canvas")
        covered = torch.zeros(length, dtype=torch.bool)
        self.starts[slot], self.ends[slot] = 0, 0
        for number, (start, end) in enumerate(draft.blocks):
            covered[start:end] = True
            self.starts[slot, number], self.ends[slot, number] = start, end
        if bool((gaps & ~covered).any()):
            raise ValueError("a gap lies outside of the draft's blocks")
        self.tokens[slot] = self.mask_id
        self.tokens[slot, :length] = torch.tensor(draft.tokens, dtype=torch.int64).masked_fill(gaps, self.mask_id)
        self.open[slot], self.given[slot] = False, True
        self.open[slot, :length], self.given[slot, :length] = gaps, ~gaps
        self.lengths[slot], self.blocks[slot], self.stream[slot] = length, len(draft.blocks), draft.stream


def continuation(
    prompt: Sequence[int], new_tokens: int, block_length: int | None, stream: int = 0, grid: int | None = None
) -> Request:
    """A prompt to be continued by `new_tokens`.

    Args:
        prompt: may be empty.
        new_tokens: at least one.
        block_length: of blocks counted from the prompt's end, as LLaDA has them; None = one block of all.
        stream: see `Draft`.
        grid: block size of a block-causal model: blocks lie on its grid, counted from position 0, and the last one is
            filled up (LLaDA2); `block_length` does not count then.
    """
    start, length = len(prompt), len(prompt) + new_tokens
    if grid is None:
        size = block_length or new_tokens
        blocks = [(at, min(at + size, length)) for at in range(start, length, size)]
    else:
        blocks = [(at, at + grid) for at in range(start // grid * grid, length, grid)]
    total = blocks[-1][1]
    gaps = [False] * start + [True] * (total - start)
    return Request([*prompt, *[0] * (total - start)], gaps, blocks, stream, length)


def infilling(
    tokens: Sequence[int], gaps: Sequence[bool], block_length: int | None, stream: int = 0, grid: int | None = None
) -> Request:
    """A text whose positions with a true `gaps` are to be filled, wherever they are.

    Args:
        tokens: those at the gaps are ignored.
        gaps: as long as `tokens`.
        block_length: gaps of one block, left to right; None = all are one block, written in any order.
        stream: see `Draft`.
        grid: block size of a block-causal model: blocks are those of its grid that hold a gap. The text is not filled
            up: what lies behind a block is not seen.
    """
    places = [i for i, gap in enumerate(gaps) if gap]
    if grid is None:
        size = block_length or max(1, len(places))
        parts = [places[i : i + size] for i in range(0, len(places), size)]
        blocks = [(part[0], part[-1] + 1) for part in parts]
    else:
        numbers = sorted({place // grid for place in places})
        blocks = [(number * grid, min((number + 1) * grid, len(tokens))) for number in numbers]
    return Request(list(tokens), list(gaps), blocks, stream)


def stretches(flags: Tensor) -> list[tuple[int, int]]:
    """The maximal stretches [start, end) of true positions, of bool `[seq]`."""
    edges = torch.nn.functional.pad(flags.int(), (1, 1)).diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


@dataclass(frozen=True)
class ActiveBlock:
    """One row per sequence, one column per position from `first` on; all on the host.

    A row ends at its block's end; columns behind it are neither masked nor editable.
    """

    slot: Tensor
    """[rows] int64."""
    stream: Tensor
    """[rows] int64: see `Canvas`."""
    first: Tensor
    """[rows] int64: position of column 0: the block's start, or that of an earlier block which an editor may change."""
    start: Tensor
    """[rows] int64: where the current block begins."""
    end: Tensor
    """[rows] int64: where it ends."""
    length: Tensor
    """[rows] int64: positions of the sequence."""
    tokens: Tensor
    """[rows, columns] int64: what stands there; the mask token where masked."""
    masked: Tensor
    """[rows, columns] bool: open positions of the current block, of which the schedule chooses."""
    editable: Tensor
    """[rows, columns] bool: written positions of this and the reachable blocks, which an editor may change."""
    step: Tensor
    """[rows] int64: steps that the sequence has taken before this one."""
    step_in_block: Tensor
    """[rows] int64."""
    block: Tensor
    """[rows] int64: number of the current block."""
    blocks: Tensor
    """[rows] int64: blocks of the sequence."""
    masks: Tensor
    """[rows] int64: open positions of the current block at its first step."""

    @cached_property
    def positions(self) -> Tensor:
        """Of each column in its sequence, int64 `[rows, columns]`; those from the row's `end` on belong to no block."""
        return self.first[:, None] + torch.arange(self.tokens.shape[1])


@dataclass(frozen=True)
class LogitRows:
    """Which rows of logits are read; each int64 `[rows]`, on the host."""

    slot: Tensor
    position: Tensor
    stream: Tensor
    step: Tensor
    """Steps that the sequence has taken: with `stream` and `position` the name of a random draw."""
    current: Tensor
    """The token that stands there."""
