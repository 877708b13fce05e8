"""The sampling loop: run the model, look at the open positions of each row's block, commit some, until none is open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling.canvas import Canvas
from llada_megatron.llada_moe.sampling.schedules import Progress, Schedule
from llada_megatron.llada_moe.sampling.statistics import RowNames, row_statistics

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""forward(tokens [batch, seq], rows [batch, seq] bool, boundaries) -> logits [selected rows, vocab], in order of
(sequence, position)."""


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are drawn, whatever the schedule."""

    mask_id: int
    excluded: Sequence[int] = ()
    """Ids that are never written, besides the mask."""
    stop_id: int | None = None
    """A row ends at this token, once nothing before it is open; the rest of the row is filled with it."""
    temperature: float = 0.0
    guidance: float = 0.0
    """Classifier-free guidance w: logits + w * (logits - logits without the given text); 0 = off."""
    seed: int = 0


@torch.no_grad()
def sample(forward: Forward, canvas: Canvas, schedule: Schedule, options: SamplingOptions) -> int:
    """Fill the open positions of `canvas` in place; returns the number of forward passes.

    Rows proceed independently: each through its own blocks, and a finished row is not run again.
    """
    state = _State.of(canvas)
    given = ~canvas.open
    passes = 0
    while canvas.open.any():
        rows = canvas.open.any(1).nonzero().flatten()
        candidates = canvas.current()[rows]
        progress = state.progress(canvas, candidates, rows)
        logits = _logits(forward, canvas, rows, candidates, given, options)
        row, position = candidates.nonzero(as_tuple=True)
        names = RowNames(progress.stream[row], progress.step[row], position)
        statistics = row_statistics(
            logits, [options.mask_id, *options.excluded], options.temperature, options.seed, names
        )
        commit = schedule.select(statistics, candidates, progress)
        _write(canvas, rows, candidates, commit, statistics.token)
        if options.stop_id is not None:
            _stop(canvas, given, options.stop_id)
        passes += 1
    return passes


@dataclass
class _State:
    """What the loop remembers of each row `[batch]`."""

    step: Tensor
    step_in_block: Tensor
    block: Tensor
    masks: Tensor
    blocks: Tensor

    @classmethod
    def of(cls, canvas: Canvas) -> _State:
        zeros = torch.zeros_like(canvas.lengths)
        return cls(zeros.clone(), zeros.clone(), zeros - 1, zeros.clone(), canvas.blocks)

    def progress(self, canvas: Canvas, candidates: Tensor, rows: Tensor) -> Progress:
        """Account for the step that these rows are about to take."""
        block = canvas.block[rows].masked_fill(~candidates, -1).amax(1)
        same = block == self.block[rows]
        self.step_in_block[rows] = torch.where(same, self.step_in_block[rows] + 1, 0)
        self.masks[rows] = torch.where(same, self.masks[rows], candidates.sum(1))
        self.block[rows] = block
        self.step[rows] += 1
        return Progress(
            canvas.stream[rows],
            self.step[rows] - 1,
            self.step_in_block[rows],
            block,
            self.blocks[rows],
            self.masks[rows],
        )


def _logits(
    forward: Forward, canvas: Canvas, rows: Tensor, candidates: Tensor, given: Tensor, options: SamplingOptions
) -> Tensor:
    """Logits of the candidates `[candidates, vocab]`, guided if asked for."""
    tokens = canvas.tokens[rows]
    if not options.guidance:
        return forward(tokens, candidates, canvas.boundaries(rows))
    blank = tokens.masked_fill(given[rows], options.mask_id)
    both = forward(torch.cat([tokens, blank]), candidates.repeat(2, 1), canvas.boundaries(rows.repeat(2)))
    conditional, unconditional = both.chunk(2)
    return unconditional + (1.0 + options.guidance) * (conditional - unconditional)


def _write(canvas: Canvas, rows: Tensor, candidates: Tensor, commit: Tensor, token: Tensor) -> None:
    """Put the chosen tokens at the committed positions."""
    tokens = canvas.tokens[rows]
    predicted = tokens.masked_scatter(candidates, token)
    canvas.tokens[rows] = torch.where(commit, predicted, tokens)
    canvas.open[rows] = canvas.open[rows] & ~commit


def _stop(canvas: Canvas, given: Tensor, stop_id: int) -> None:
    """End the rows that wrote `stop_id` with nothing open before it: the rest of what they were to write becomes it."""
    written = (canvas.tokens == stop_id) & ~given & ~canvas.open
    settled = canvas.open.cumsum(1) == 0  # nothing open up to here
    after = (written & settled).cumsum(1) > 0
    rest = after & ~given & (torch.arange(after.shape[1], device=after.device) < canvas.lengths[:, None])
    canvas.tokens[rest] = stop_id
    canvas.open &= ~after
