"""The tokens of several sequences while they are sampled, their active blocks, and the identity of rows of logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Request:
    """One sequence to be sampled, before it has a slot in a buffer."""

    tokens: Sequence[int]
    """Token ids of all positions; those at open positions are ignored."""
    gaps: Sequence[bool]
    """True = the position is open, that is, its token is to be sampled. A mask token elsewhere is ordinary text."""
    blocks: Sequence[tuple[int, int]]
    """Extents [start, end) that are sampled one after another; every open position lies in one of them."""
    stream: int
    """Number of the sequence among all sequences. It selects the random draws, so that these do not depend on which
    sequences run together."""
    length: int | None = None
    """Positions of the result; those after them fill up the last block and are cut off. None = all positions."""


@dataclass
class TokenBuffer:
    """The sequences of a group. Each slot holds one, padded on the right with mask tokens that nothing attends to.

    All tensors are on the host.
    """

    tokens: Tensor
    """[slots, seq] int64: token ids; the mask token where a position is open."""
    open: Tensor
    """[slots, seq] bool: positions that are still to be sampled."""
    given: Tensor
    """[slots, seq] bool: positions that must not change (the prompt, and the padding after the sequence)."""
    lengths: Tensor
    """[slots] int64: positions of each sequence."""
    starts: Tensor
    """[slots, blocks] int64: first position of each block; 0 after the last block."""
    ends: Tensor
    """[slots, blocks] int64: the position after the last one of each block; 0 after the last block."""
    block_count: Tensor
    """[slots] int64: number of blocks of each sequence."""
    stream: Tensor
    """[slots] int64: which random draws a sequence uses; see `Request.stream`."""
    mask_id: int

    @classmethod
    def empty(cls, slots: int, seq: int, blocks: int, mask_id: int) -> TokenBuffer:
        """Empty slots for sequences of up to `seq` positions in up to `blocks` blocks."""
        zeros = torch.zeros(slots, dtype=torch.int64)
        return cls(
            tokens=torch.full((slots, seq), mask_id, dtype=torch.int64),
            open=torch.zeros(slots, seq, dtype=torch.bool),
            given=torch.ones(slots, seq, dtype=torch.bool),
            lengths=zeros.clone(),
            starts=torch.zeros(slots, blocks, dtype=torch.int64),
            ends=torch.zeros(slots, blocks, dtype=torch.int64),
            block_count=zeros.clone(),
            stream=zeros.clone(),
            mask_id=mask_id,
        )

    def put(self, slot: int, request: Request) -> None:
        """Put a sequence into a slot, in the place of what the slot held.

        Raises:
            ValueError: the request does not fit, or an open position lies outside of its blocks.
        """
        length, gaps = len(request.tokens), torch.tensor(request.gaps, dtype=torch.bool)
        if length > self.tokens.shape[1] or len(request.blocks) > self.starts.shape[1] or len(gaps) != length:
            raise ValueError(
                f"a request of {length} positions in {len(request.blocks)} blocks does not fit the token buffer"
            )
        covered = torch.zeros(length, dtype=torch.bool)
        self.starts[slot], self.ends[slot] = 0, 0
        for number, (start, end) in enumerate(request.blocks):
            covered[start:end] = True
            self.starts[slot, number], self.ends[slot, number] = start, end
        if bool((gaps & ~covered).any()):
            raise ValueError("a gap lies outside of the request's blocks")
        self.tokens[slot] = self.mask_id
        self.tokens[slot, :length] = torch.tensor(request.tokens, dtype=torch.int64).masked_fill(gaps, self.mask_id)
        self.open[slot], self.given[slot] = False, True
        self.open[slot, :length], self.given[slot, :length] = gaps, ~gaps
        self.lengths[slot], self.block_count[slot] = length, len(request.blocks)
        self.stream[slot] = request.stream


def continuation(
    prompt: Sequence[int], new_tokens: int, block_length: int | None, stream: int = 0, grid: int | None = None
) -> Request:
    """The request to continue a prompt by `new_tokens` tokens.

    Args:
        prompt: token ids; may be empty.
        new_tokens: at least one.
        block_length: positions of a block, counted from the end of the prompt as in LLaDA; None = one single block.
        stream: see `Request`.
        grid: block size of a block-causal model. Its blocks are counted from position 0, the last one is filled up
            (as in LLaDA2), and `block_length` is ignored.
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
    """The request to fill the positions of a text where `gaps` is true.

    Args:
        tokens: token ids of the whole text; those at the gaps are ignored.
        gaps: as long as `tokens`.
        block_length: open positions of a block, from left to right; None = one block, filled in any order.
        stream: see `Request`.
        grid: block size of a block-causal model: the blocks are those of its grid that hold an open position. The last
            one is not filled up, since a block-causal model sees nothing after a block.
    """
    positions = [i for i, gap in enumerate(gaps) if gap]
    if grid is None:
        size = block_length or max(1, len(positions))
        parts = [positions[i : i + size] for i in range(0, len(positions), size)]
        blocks = [(part[0], part[-1] + 1) for part in parts]
    else:
        numbers = sorted({position // grid for position in positions})
        blocks = [(number * grid, min((number + 1) * grid, len(tokens))) for number in numbers]
    return Request(list(tokens), list(gaps), blocks, stream)


def stretches(flags: Tensor) -> list[tuple[int, int]]:
    """The maximal runs [start, end) of true positions in a bool tensor `[seq]`."""
    edges = torch.nn.functional.pad(flags.int(), (1, 1)).diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


@dataclass(frozen=True)
class ActiveBlock:
    """The blocks that several sequences are in at present: one row per sequence, one column per position from `first`.

    A row ends at the end of its block; the columns after it are neither masked nor editable. All tensors are on the
    host.
    """

    slot: Tensor
    """[rows] int64: slot of each sequence in the token buffer."""
    stream: Tensor
    """[rows] int64: see `TokenBuffer`."""
    first: Tensor
    """[rows] int64: position of column 0, which is the start of the block, or of an earlier one that an editor may
    change."""
    start: Tensor
    """[rows] int64: first position of the current block."""
    end: Tensor
    """[rows] int64: the position after the last one of the current block."""
    length: Tensor
    """[rows] int64: positions of the sequence."""
    tokens: Tensor
    """[rows, columns] int64: the present tokens; the mask token where masked."""
    masked: Tensor
    """[rows, columns] bool: open positions of the current block, from which the schedule chooses."""
    editable: Tensor
    """[rows, columns] bool: sampled positions of the current and of reachable earlier blocks, which an editor may
    change."""
    step: Tensor
    """[rows] int64: steps that the sequence has taken before this one."""
    step_in_block: Tensor
    """[rows] int64: steps that it has taken in the current block."""
    index: Tensor
    """[rows] int64: number of the current block, from 0."""
    block_count: Tensor
    """[rows] int64: number of blocks of the sequence."""
    masks: Tensor
    """[rows] int64: open positions of the current block at its first step."""

    @cached_property
    def positions(self) -> Tensor:
        """Position of each column in its sequence, int64 `[rows, columns]`; from the row's `end` on in no block."""
        return self.first[:, None] + torch.arange(self.tokens.shape[1])


@dataclass(frozen=True)
class LogitRows:
    """What identifies the rows of logits of a pass: int64 tensors `[rows]` on the host."""

    slot: Tensor
    position: Tensor
    stream: Tensor
    step: Tensor
    """Steps that the sequence has taken. With `stream` and `position` it identifies a random draw."""
    current: Tensor
    """The token at the position before this step."""
