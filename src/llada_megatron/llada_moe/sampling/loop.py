"""The sampling loop over a group of sequences: plan a pass, read its statistics, commit tokens, until nothing is open.

The loop runs no model. `SequenceGroup.plan` returns the pass to be run and `SequenceGroup.apply` takes its statistics,
so that a caller decides where the model runs and what runs meanwhile. Sequences proceed independently, each through its
own blocks; one that is finished makes room for the next.
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
    """A sampling method: a schedule, a cache and an editor, and how logits are processed."""

    schedule: Schedule = field(default_factory=FixedSteps)
    cache: Cache = field(default_factory=NoCache)
    editor: Editor = field(default_factory=NoEditor)
    logits_processor: LogitsProcessor = field(default_factory=LogitsProcessor)
    stop_id: int | None = None
    """Id of the end-of-text token, or None. A sequence ends at the first such token that was sampled, once nothing
    before it is open and its block is edited; the rest of the sequence is filled with the token. The text before it is
    the same as without a stop token, unless an editor reaches into earlier blocks, since the blocks after the end are
    not sampled and so cannot change earlier ones."""
    grid: int | None = None
    """Block size of a block-causal model."""
    causal_text: bool = False
    """The model sees what stands before a block causally (`Objective.verifies`), not block by block."""

    def __post_init__(self) -> None:
        """Add the statistics that the schedule and the editor need to those of `logits_processor`."""
        needs = frozenset([*self.logits_processor.needs, *self.schedule.needs, *self.editor.needs])
        processor = replace(self.logits_processor, needs=needs, operations=tuple(self.editor.operations))
        object.__setattr__(self, "logits_processor", processor)


@dataclass(frozen=True)
class Finished:
    """A finished sequence and its cost."""

    stream: int
    tokens: list[int]
    given: list[bool]
    """Positions that were not to be sampled."""
    passes: int
    """Forward passes that the sequence took part in."""
    positions_run: int
    """Positions that ran through the layers for it, shadows and the unconditional rows of guidance included."""
    rows_read: int
    """Rows of logits that were read for it."""


@dataclass(frozen=True)
class Step:
    """What one pass changed."""

    block: ActiveBlock
    """The active block before the pass."""
    statistics: Statistics
    """Statistics of its positions, `[rows, columns]`."""
    revision: Revision
    changed: Tensor
    """[rows, columns] bool: positions that hold another token than before, or became open again."""
    finished: list[Finished]
    """Sequences that the pass completed."""


@dataclass(frozen=True)
class _PlannedPass:
    """A pass that was planned and whose statistics have not been applied yet."""

    block: ActiveBlock
    plan: CachePlan
    work: Pass
    prefilling: Tensor
    """[rows] bool: rows that only run a piece of their prompt and commit nothing."""


class SequenceGroup:
    """Sequences that run together in the same passes."""

    def __init__(self, method: Method, slots: int, seq: int, blocks: int, mask_id: int) -> None:
        """Room for `slots` sequences of up to `seq` positions in up to `blocks` blocks."""
        self.method = method
        self.buffer = TokenBuffer.empty(slots, seq, blocks, mask_id)
        self.passes = 0
        """Forward passes of the group so far."""
        self._schedule = method.schedule.start(slots, seq)
        self._editor = method.editor.start(slots, seq)
        zeros = torch.zeros(slots, dtype=torch.int64)
        self._active = torch.zeros(slots, dtype=torch.bool)
        self._block, self._step, self._step_in_block = zeros.clone(), zeros.clone(), zeros.clone()
        self._masks, self._valid = zeros.clone(), zeros.clone()
        self._kept = zeros.clone()  # positions of the result
        self._cost = torch.zeros(slots, 3, dtype=torch.int64)  # passes, positions run, rows read
        self._pending: _PlannedPass | None = None

    @property
    def free(self) -> list[int]:
        """Slots that hold no unfinished sequence."""
        return (~self._active).nonzero().flatten().tolist()

    def admit(self, slot: int, request: Request) -> None:
        """Begin a sequence in a free slot.

        Raises:
            ValueError: the sequence has no open position, or does not fit.
        """
        if not any(request.gaps):
            raise ValueError("a request without a gap: there is nothing to sample")
        self.buffer.put(slot, request)
        self._kept[slot] = len(request.tokens) if request.length is None else request.length
        self._active[slot] = True
        for counter in (self._block, self._step, self._step_in_block, self._masks, self._valid):
            counter[slot] = 0
        self._cost[slot] = 0

    def plan(self) -> Pass | None:
        """The pass to be run next; None if no sequence is unfinished."""
        if not self._active.any():
            return None
        block = self._active_block()
        plan = self.method.cache.plan(block, self._valid[block.slot])
        reach = self._schedule.reach(block)
        if reach is not None:
            plan = CachePlan(plan.low, torch.minimum(plan.high, reach), torch.minimum(plan.keys, reach))
        plan, prefilling = self._in_pieces(plan, block)
        wanted = block.masked | block.editable if self.method.editor.edits else block.masked
        wanted = wanted & (block.positions < plan.high[:, None]) & ~prefilling[:, None]
        guided = bool(self.method.logits_processor.guidance)
        work = pack(self.buffer, block, plan, wanted, self.method.editor.shadow, guided, self.method.causal_text)
        cost = [torch.ones_like(block.slot), work.totals(len(block.slot)), wanted.sum(1)]
        self._cost[block.slot] += torch.stack(cost, 1)
        self.passes += 1
        self._pending = _PlannedPass(block, plan, work, prefilling)
        return work

    def apply(self, statistics: Statistics) -> Step:
        """Apply the statistics `[rows]` of the pass that was planned last: commit and revise tokens."""
        if self._pending is None:
            raise RuntimeError("there is no planned pass to apply statistics to")
        pending, self._pending = self._pending, None
        block, stepping = pending.block, ~pending.prefilling
        by_position = statistics.scattered(pending.work.offsets, tuple(block.masked.shape))
        chosen = self._schedule.select(by_position, block) & block.masked & stepping[:, None]
        revision = self._editor.revise(by_position, block, chosen)
        changed = self._write(block, revision, stepping)
        self._advance(block, pending.plan, revision, changed, stepping)
        return Step(block, by_position, revision, changed, self._finished(block))

    def _active_block(self) -> ActiveBlock:
        """The positions of the unfinished sequences that can change now."""
        buffer, slot = self.buffer, self._active.nonzero().flatten()
        index = self._block[slot]
        start, end = buffer.starts[slot, index], buffer.ends[slot, index]
        first = buffer.starts[slot, (index - self.method.editor.reach).clamp(min=0)]
        position = first[:, None] + torch.arange(int((end - first).max()))
        inside = position < end[:, None]
        position = position.clamp(max=buffer.tokens.shape[1] - 1)
        is_open = buffer.open[slot[:, None], position] & inside
        new = self._step_in_block[slot] == 0
        self._masks[slot] = torch.where(new, is_open.sum(1), self._masks[slot])
        return ActiveBlock(
            slot=slot,
            stream=buffer.stream[slot],
            first=first,
            start=start,
            end=end,
            length=buffer.lengths[slot],
            tokens=buffer.tokens[slot[:, None], position],
            masked=is_open,
            editable=inside & ~is_open & ~buffer.given[slot[:, None], position],
            step=self._step[slot],
            step_in_block=self._step_in_block[slot],
            index=index,
            block_count=buffer.block_count[slot],
            masks=self._masks[slot],
        )

    def _in_pieces(self, plan: CachePlan, block: ActiveBlock) -> tuple[CachePlan, Tensor]:
        """Shorten plans that begin far before the block: those rows run a piece of their prompt, without logits.

        Returns the plan, and the rows that are shortened, bool `[rows]`.
        """
        cache, grid = self.method.cache, self.method.grid
        if not isinstance(cache, BlockCausalCache) or grid is None:
            return plan, torch.zeros_like(block.slot, dtype=torch.bool)
        piece = max(grid, cache.prefill // grid * grid)
        long = block.first - plan.low > piece
        high = torch.where(long, plan.low + piece, plan.high)
        return CachePlan(plan.low, high, high), long

    def _write(self, block: ActiveBlock, revision: Revision, stepping: Tensor) -> Tensor:
        """Put a revised block into the buffer; returns the changed positions, bool `[rows, columns]`."""
        masked = revision.masked & stepping[:, None]
        tokens = revision.tokens.masked_fill(masked, self.buffer.mask_id)
        free = (block.masked | block.editable) & stepping[:, None]
        changed = free & ((tokens != block.tokens) | (masked != block.masked))
        row, column = changed.nonzero(as_tuple=True)
        slot, position = block.slot[row], block.first[row] + column
        self.buffer.tokens[slot, position] = tokens[row, column]
        self.buffer.open[slot, position] = masked[row, column]
        return changed

    def _advance(
        self, block: ActiveBlock, plan: CachePlan, revision: Revision, changed: Tensor, stepping: Tensor
    ) -> None:
        """Advance the counters, go on to the next block where one is done, and end sequences at their stop token."""
        slot, done = block.slot, revision.done & stepping
        self._step[slot] += stepping.long()
        self._step_in_block[slot] = torch.where(done, 0, block.step_in_block + stepping.long())
        self._block[slot] = block.index + done.long()
        unsettled = changed | (block.masked & ~stepping[:, None]) | revision.masked
        self._valid[slot] = self._still_valid(block, plan, unsettled)
        stopped = self._stop(block, done | (stepping & (not self.method.editor.edits)))
        self._active[slot] = ~stopped & (self._block[slot] < block.block_count)

    def _still_valid(self, block: ActiveBlock, plan: CachePlan, unsettled: Tensor) -> Tensor:
        """The position below which the cached keys belong to the present tokens, int64 `[rows]`.

        A pass computes the keys of the positions it runs. Where a token of a block changed in this step or is still
        open, the keys of that block are not those of its final tokens; neither are those of later blocks, which
        attended to it.

        Args:
            block: the active block before the step.
            plan: what was run.
            unsettled: bool `[rows, columns]`, positions that changed or are open.
        """
        if self.method.grid is None:
            return torch.zeros_like(block.slot)
        column = torch.where(unsettled.any(1), unsettled.long().argmax(1), plan.high - block.first)
        if self.method.causal_text:  # a finished block is read once more
            return torch.minimum(block.start, plan.high)
        return torch.minimum((block.first + column) // self.method.grid * self.method.grid, plan.high)

    def _stop(self, block: ActiveBlock, settled: Tensor) -> Tensor:
        """End the settled rows whose block holds a sampled stop token with no open position before it: bool `[rows]`.

        All later positions that are not given become that token.
        """
        stop, buffer = self.method.stop_id, self.buffer
        if stop is None or not settled.any():
            return torch.zeros_like(settled)
        inside = block.positions < block.end[:, None]
        position = block.positions.clamp(max=buffer.tokens.shape[1] - 1)
        tokens = buffer.tokens[block.slot[:, None], position]
        still_open = buffer.open[block.slot[:, None], position] & inside
        written = (block.masked | block.editable) & ~still_open & (tokens == stop)
        found = written & (still_open.cumsum(1) == 0) & settled[:, None]
        for row in found.any(1).nonzero().flatten().tolist():
            slot, after = int(block.slot[row]), int(block.first[row] + found[row].long().argmax())
            rest = slice(after, int(block.length[row]))
            free = ~buffer.given[slot, rest]
            buffer.tokens[slot, rest][free] = stop
            buffer.open[slot, rest] = False
        return found.any(1)

    def _finished(self, block: ActiveBlock) -> list[Finished]:
        """The sequences of the active block that have just ended."""
        finished = []
        for slot in block.slot[~self._active[block.slot]].tolist():
            kept = int(self._kept[slot])
            tokens, given = self.buffer.tokens[slot, :kept].tolist(), self.buffer.given[slot, :kept].tolist()
            finished.append(Finished(int(self.buffer.stream[slot]), tokens, given, *self._cost[slot].tolist()))
        return finished
