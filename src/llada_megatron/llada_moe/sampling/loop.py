"""The sampling loop over a group of sequences: plan a pass, read its statistics, commit, until nothing is open.

The loop runs no model. `Group.plan` says what is to be run and `Group.apply` takes what came of it, so that a caller
decides where it runs and what runs meanwhile. Sequences proceed independently, each through its own blocks; one that is
finished makes room for the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling.caches import BlockCausalCache, Cache, CachePlan, NoCache
from llada_megatron.llada_moe.sampling.editors import Editor, NoEditor, Revision
from llada_megatron.llada_moe.sampling.passes import Pass, pack
from llada_megatron.llada_moe.sampling.schedules import FixedSteps, Schedule
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor, Statistics
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock, Request, TokenBuffer


@dataclass(frozen=True)
class Method:
    """A sampling method is three choices, and how tokens are read."""

    schedule: Schedule = field(default_factory=FixedSteps)
    cache: Cache = field(default_factory=NoCache)
    editor: Editor = field(default_factory=NoEditor)
    reading: LogitsProcessor = field(default_factory=LogitsProcessor)
    stop_id: int | None = None
    """A sequence ends at this token, once nothing before it is open and its block is edited; the rest of it is filled
    with it. What stands before it is what would stand there without an end, unless an editor reaches into earlier
    blocks: no block behind the end is written to change what is before it."""
    grid: int | None = None
    """Block size of a block-causal model."""

    def __post_init__(self) -> None:
        """What the schedule and the editor need is read, whatever `reading` says."""
        needs = frozenset([*self.reading.needs, *self.schedule.needs, *self.editor.needs])
        reading = replace(self.reading, needs=needs, operations=tuple(self.editor.operations))
        object.__setattr__(self, "reading", reading)


@dataclass(frozen=True)
class Finished:
    """A sequence as it was left, and what it took."""

    stream: int
    tokens: list[int]
    given: list[bool]
    """Positions that were not to be written."""
    passes: int
    """Forward passes that it took part in."""
    positions_run: int
    """Positions that ran through the layers for it, with shadows and the blank twins of guidance."""
    rows_read: int
    """Rows of logits that were read for it."""


@dataclass(frozen=True)
class Step:
    """What one pass changed."""

    view: ActiveBlock
    """Before it."""
    statistics: Statistics
    """`[rows, columns]`."""
    revision: Revision
    changed: Tensor
    """[rows, columns] bool: positions that hold another token than before, or became open."""
    finished: list[Finished]


@dataclass(frozen=True)
class _PlannedPass:
    """A pass that was planned and has not been applied."""

    view: ActiveBlock
    plan: CachePlan
    work: Pass
    prefilling: Tensor
    """[rows] bool: rows that only run a piece of their prompt."""


class SequenceGroup:
    """Sequences that are written together."""

    def __init__(self, method: Method, slots: int, seq: int, blocks: int, mask_id: int) -> None:
        """Room for `slots` sequences of up to `seq` positions in up to `blocks` blocks."""
        self.method = method
        self.canvas = TokenBuffer.empty(slots, seq, blocks, mask_id)
        self.passes = 0
        """Forward passes of the group."""
        self._schedule = method.schedule.start(slots, seq)
        self._editor = method.editor.start(slots, seq)
        zeros = torch.zeros(slots, dtype=torch.int64)
        self._active = torch.zeros(slots, dtype=torch.bool)
        self._block, self._step, self._step_in_block = zeros.clone(), zeros.clone(), zeros.clone()
        self._masks, self._valid = zeros.clone(), zeros.clone()
        self._kept = zeros.clone()  # positions of the result
        self._taken = torch.zeros(slots, 3, dtype=torch.int64)  # passes, positions run, rows read
        self._pending: _PlannedPass | None = None

    @property
    def free(self) -> list[int]:
        """Slots that hold nothing unfinished."""
        return (~self._active).nonzero().flatten().tolist()

    def admit(self, slot: int, draft: Request) -> None:
        """Begin a sequence in a free slot.

        Raises:
            ValueError: it has no gap, or does not fit.
        """
        if not any(draft.gaps):
            raise ValueError("a draft without a gap: there is nothing to write")
        self.canvas.put(slot, draft)
        self._kept[slot] = len(draft.tokens) if draft.length is None else draft.length
        self._active[slot] = True
        for counter in (self._block, self._step, self._step_in_block, self._masks, self._valid):
            counter[slot] = 0
        self._taken[slot] = 0

    def plan(self) -> Pass | None:
        """What is to be run next; None = nothing is unfinished."""
        if not self._active.any():
            return None
        view = self._view()
        plan = self.method.cache.plan(view, self._valid[view.slot])
        reach = self._schedule.reach(view)
        if reach is not None:
            plan = CachePlan(plan.low, torch.minimum(plan.high, reach), torch.minimum(plan.keys, reach))
        plan, prefilling = self._in_pieces(plan, view)
        ask = view.masked | view.editable if self.method.editor.edits else view.masked
        ask = ask & (view.positions < plan.high[:, None]) & ~prefilling[:, None]
        work = pack(self.canvas, view, plan, ask, self.method.editor.shadow, bool(self.method.reading.guidance))
        self._taken[view.slot] += torch.stack([torch.ones_like(view.slot), work.totals(len(view.slot)), ask.sum(1)], 1)
        self.passes += 1
        self._pending = _PlannedPass(view, plan, work, prefilling)
        return work

    def apply(self, statistics: Statistics) -> Step:
        """Take the statistics `[rows]` of the pass that was planned last."""
        if self._pending is None:
            raise RuntimeError("there is no planned pass to apply statistics to")
        pending, self._pending = self._pending, None
        view, live = pending.view, ~pending.prefilling
        placed = statistics.placed(pending.work.place, tuple(view.masked.shape))
        chosen = self._schedule.select(placed, view) & view.masked & live[:, None]
        revision = self._editor.revise(placed, view, chosen)
        changed = self._write(view, revision, live)
        self._account(view, pending.plan, revision, changed, live)
        return Step(view, placed, revision, changed, self._finished(view))

    def _view(self) -> ActiveBlock:
        """The stretches of the active sequences that can change now."""
        canvas, slot = self.canvas, self._active.nonzero().flatten()
        block = self._block[slot]
        start, end = canvas.starts[slot, block], canvas.ends[slot, block]
        first = canvas.starts[slot, (block - self.method.editor.reach).clamp(min=0)]
        position = first[:, None] + torch.arange(int((end - first).max()))
        inside = position < end[:, None]
        position = position.clamp(max=canvas.tokens.shape[1] - 1)
        is_open = canvas.open[slot[:, None], position] & inside
        new = self._step_in_block[slot] == 0
        self._masks[slot] = torch.where(new, is_open.sum(1), self._masks[slot])
        return ActiveBlock(
            slot=slot,
            stream=canvas.stream[slot],
            first=first,
            start=start,
            end=end,
            length=canvas.lengths[slot],
            tokens=canvas.tokens[slot[:, None], position],
            masked=is_open,
            editable=inside & ~is_open & ~canvas.given[slot[:, None], position],
            step=self._step[slot],
            step_in_block=self._step_in_block[slot],
            block=block,
            blocks=canvas.blocks[slot],
            masks=self._masks[slot],
        )

    def _in_pieces(self, plan: CachePlan, view: ActiveBlock) -> tuple[CachePlan, Tensor]:
        """Cut plans with a long way to the view short: those rows run a piece of their prompt and ask for nothing."""
        cache, grid = self.method.cache, self.method.grid
        if not isinstance(cache, BlockCausalCache) or grid is None:
            return plan, torch.zeros_like(view.slot, dtype=torch.bool)
        piece = max(grid, cache.prefill // grid * grid)
        long = view.first - plan.low > piece
        high = torch.where(long, plan.low + piece, plan.high)
        return CachePlan(plan.low, high, high), long

    def _write(self, view: ActiveBlock, revision: Revision, live: Tensor) -> Tensor:
        """Put a revised view into the canvas; returns the changed positions `[rows, columns]`."""
        masked = revision.masked & live[:, None]
        tokens = revision.tokens.masked_fill(masked, self.canvas.mask_id)
        free = (view.masked | view.editable) & live[:, None]
        changed = free & ((tokens != view.tokens) | (masked != view.masked))
        row, column = changed.nonzero(as_tuple=True)
        slot, position = view.slot[row], view.first[row] + column
        self.canvas.tokens[slot, position] = tokens[row, column]
        self.canvas.open[slot, position] = masked[row, column]
        return changed

    def _account(self, view: ActiveBlock, plan: CachePlan, revision: Revision, changed: Tensor, live: Tensor) -> None:
        """Advance the counters, go on to the next block where one is done, and end what met its stop token."""
        slot, done = view.slot, revision.done & live
        self._step[slot] += live.long()
        self._step_in_block[slot] = torch.where(done, 0, view.step_in_block + live.long())
        self._block[slot] = view.block + done.long()
        self._valid[slot] = self._still_valid(view, plan, changed | (view.masked & ~live[:, None]) | revision.masked)
        stopped = self._stop(view, done | (live & (not self.method.editor.edits)))
        self._active[slot] = ~stopped & (self._block[slot] < view.blocks)

    def _still_valid(self, view: ActiveBlock, plan: CachePlan, loose: Tensor) -> Tensor:
        """Below which position the kept keys are those of the tokens that stand there, int64 `[rows]`.

        A pass makes the keys of what it runs; those of a block with a token that changed since, or is still open, are
        not those of its final tokens, nor are those of any block behind it, which saw them.
        """
        if self.method.grid is None:
            return torch.zeros_like(view.slot)
        column = torch.where(loose.any(1), loose.long().argmax(1), plan.high - view.first)
        return torch.minimum((view.first + column) // self.method.grid * self.method.grid, plan.high)

    def _stop(self, view: ActiveBlock, settled: Tensor) -> Tensor:
        """End the settled rows whose block holds a written stop token with nothing open before it: bool `[rows]`.

        The rest of what they were to write becomes that token.
        """
        stop, canvas = self.method.stop_id, self.canvas
        if stop is None or not settled.any():
            return torch.zeros_like(settled)
        inside = view.positions < view.end[:, None]
        position = view.positions.clamp(max=canvas.tokens.shape[1] - 1)
        tokens = canvas.tokens[view.slot[:, None], position]
        still_open = canvas.open[view.slot[:, None], position] & inside
        written = (view.masked | view.editable) & ~still_open & (tokens == stop)
        found = written & (still_open.cumsum(1) == 0) & settled[:, None]
        for row in found.any(1).nonzero().flatten().tolist():
            slot, after = int(view.slot[row]), int(view.first[row] + found[row].long().argmax())
            rest = slice(after, int(view.length[row]))
            free = ~canvas.given[slot, rest]
            canvas.tokens[slot, rest][free] = stop
            canvas.open[slot, rest] = False
        return found.any(1)

    def _finished(self, view: ActiveBlock) -> list[Finished]:
        """The sequences of a view that are no longer active."""
        finished = []
        for slot in view.slot[~self._active[view.slot]].tolist():
            kept = int(self._kept[slot])
            tokens, given = self.canvas.tokens[slot, :kept].tolist(), self.canvas.given[slot, :kept].tolist()
            finished.append(Finished(int(self.canvas.stream[slot]), tokens, given, *self._taken[slot].tolist()))
        return finished
