"""WINO (arXiv 2507.18578): commit widely, then take back what the text written since makes improbable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling.editors.base import Revision, RunningEditor, commit
from llada_megatron.llada_moe.sampling.schedules import Stateless, best, top
from llada_megatron.llada_moe.sampling.statistics import Need, Statistics
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock


@dataclass(frozen=True)
class WideIn(Stateless):
    """WINO's schedule: commit all predictions above a low threshold, up to a cap, and the most probable one."""

    threshold: float = 0.6
    share: float = 0.7
    """Of the block's masks: the cap, which lies between `least` and `most`."""
    least: int = 5
    most: int = 20

    def select(self, statistics: Statistics, view: ActiveBlock) -> Tensor:
        """See `schedules.Running`."""
        cap = (view.masked.sum(1) * self.share).long().clamp(self.least, self.most)
        wide = view.masked & (statistics.confidence > self.threshold)
        confident = best(statistics.confidence, wide, cap)
        return confident | top(statistics.confidence, view.masked)


@dataclass(frozen=True)
class Wino:
    """WINO's editor: written tokens that their shadows give less than `threshold` become masks again.

    In a step that commits one token nothing is taken back, and never as much as the step before committed: a block
    takes at most as many steps as it has masks.
    """

    threshold: float = 0.9

    needs = frozenset[Need]({"current"})
    edits = True
    reach = 0
    shadow = True
    operations = ()

    def start(self, slots: int, seq: int) -> RunningEditor:
        """See `Editor`."""
        return _RunningWino(self, slots)


class _RunningWino:
    def __init__(self, settings: Wino, slots: int) -> None:
        self._settings = settings
        self._committed = torch.zeros(slots, dtype=torch.int64)  # in each slot's last step

    def revise(self, statistics: Statistics, view: ActiveBlock, chosen: Tensor) -> Revision:
        """See `Revising`."""
        if statistics.current is None:
            raise RuntimeError("WINO judges written tokens by their probabilities; the reading lacks 'current'")
        committed = chosen.sum(1)
        before = torch.where(view.step_in_block == 0, 0, self._committed[view.slot])
        judged = view.editable & (statistics.confidence > 0)  # a schedule may look at a part of the block only
        doubted = judged & (statistics.current < self._settings.threshold) & (committed > 1)[:, None]
        revoked = best(-statistics.current, doubted, before - 1)
        self._committed[view.slot] = committed
        masked = (view.masked & ~chosen) | revoked
        return Revision(commit(statistics, view, chosen), masked, ~masked.any(1))
