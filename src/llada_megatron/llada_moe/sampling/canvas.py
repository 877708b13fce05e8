"""What is being written: sequences of different lengths, their open positions, and the order of their blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draft:
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
class Canvas:
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
    def empty(cls, slots: int, seq: int, blocks: int, mask_id: int) -> Canvas:
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

    def put(self, slot: int, draft: Draft) -> None:
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
) -> Draft:
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
    return Draft([*prompt, *[0] * (total - start)], gaps, blocks, stream, length)


def infilling(
    tokens: Sequence[int], gaps: Sequence[bool], block_length: int | None, stream: int = 0, grid: int | None = None
) -> Draft:
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
    return Draft(list(tokens), list(gaps), blocks, stream)


def stretches(flags: Tensor) -> list[tuple[int, int]]:
    """The maximal stretches [start, end) of true positions, of bool `[seq]`."""
    edges = torch.nn.functional.pad(flags.int(), (1, 1)).diff().nonzero().flatten().tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))
