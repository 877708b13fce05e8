"""WINO (arXiv 2507.18578): commit many tokens, then mask those again that later tokens make improbable."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llada_megatron.llada_moe.sampling.editors.editor import Revision, RunningEditor, commit
from llada_megatron.llada_moe.sampling.schedules import Stateless, best, top
from llada_megatron.llada_moe.sampling.statistics import Need, Statistics
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock


@dataclass(frozen=True)
class WideIn(Stateless):
    """The schedule of WINO: commit all predictions above a low threshold, up to a cap, and the most probable one."""

    threshold: float = 0.6
    share: float = 0.7
    """Share of the block's masks that is the cap, within the limits `least` and `most`."""
    least: int = 5
    most: int = 20

    def select(self, statistics: Statistics, block: ActiveBlock) -> Tensor:
        """Implements `RunningSchedule.select`."""
        cap = (block.masked.sum(1) * self.share).long().clamp(self.least, self.most)
        wide = block.masked & (statistics.confidence > self.threshold)
        confident = best(statistics.confidence, wide, cap)
        return confident | top(statistics.confidence, block.masked)


@dataclass(frozen=True)
class Wino:
    """The editor of WINO: sampled tokens whose shadows give them a probability below `threshold` become masks again.

    A step that commits one token takes nothing back, and a step takes back fewer tokens than the step before
    committed. So a block takes at most as many steps as it has masks.
    """

    threshold: float = 0.9

    needs = frozenset[Need]({"current"})
    edits = True
    reach = 0
    shadow = True
    operations = ()

    def start(self, slots: int, seq: int) -> RunningEditor:
        """Implements `Editor.start`."""
        return _RunningWino(self, slots)


class _RunningWino:
    def __init__(self, settings: Wino, slots: int) -> None:
        self._settings = settings
        self._committed = torch.zeros(slots, dtype=torch.int64)  # in each slot's last step

    def revise(self, statistics: Statistics, block: ActiveBlock, chosen: Tensor) -> Revision:
        """Implements `RunningEditor.revise`."""
        if statistics.current is None:
            raise RuntimeError("WINO judges sampled tokens by their probabilities: the statistics lack 'current'")
        committed = chosen.sum(1)
        before = torch.where(block.step_in_block == 0, 0, self._committed[block.slot])
        judged = block.editable & (statistics.confidence > 0)  # a schedule may look at a part of the block only
        doubted = judged & (statistics.current < self._settings.threshold) & (committed > 1)[:, None]
        revoked = best(-statistics.current, doubted, before - 1)
        self._committed[block.slot] = committed
        masked = (block.masked & ~chosen) | revoked
        return Revision(commit(statistics, block, chosen), masked, ~masked.any(1))
