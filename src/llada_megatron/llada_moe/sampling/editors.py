"""What may still change of the tokens that were written."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from llada_megatron.llada_moe.sampling.statistics import Need, Statistics
from llada_megatron.llada_moe.sampling.view import View


@dataclass(frozen=True)
class Revision:
    """A view after a step."""

    tokens: Tensor
    """[rows, columns] int64: what stands at the masked and editable positions now; elsewhere it does not count."""
    masked: Tensor
    """[rows, columns] bool: open positions of the current block now. Only masked and editable ones may be."""
    done: Tensor
    """[rows] bool: the block is finished: nothing is masked, and the editor changes nothing more."""


class Revising(Protocol):
    """An editor at work on one group of slots."""

    def revise(self, statistics: Statistics, view: View, chosen: Tensor) -> Revision:
        """What becomes of a view whose schedule chose to commit `chosen` `[rows, columns]`.

        It must make progress: every row ends its block after finitely many steps.
        """
        ...


class Editor(Protocol):
    """Settings of a rule that changes written tokens."""

    @property
    def needs(self) -> Collection[Need]:
        """Statistics that the rule reads beside token and confidence."""
        ...

    @property
    def edits(self) -> bool:
        """Whether written positions are asked for: the output layer runs on them too."""
        ...

    @property
    def reach(self) -> int:
        """How many blocks before the current one may be changed."""
        ...

    @property
    def shadow(self) -> bool:
        """Whether written positions are judged by their shadows (see `model.windows`): masks put in their place."""
        ...

    def start(self, slots: int, seq: int) -> Revising:
        """The rule at work; see `Schedule.start`."""
        ...


@dataclass(frozen=True)
class NoEditor:
    """What is written stays."""

    needs: frozenset[Need] = frozenset()
    edits: bool = False
    reach: int = 0
    shadow: bool = False

    def start(self, slots: int, seq: int) -> Revising:
        """See `Editor`."""
        return self

    def revise(self, statistics: Statistics, view: View, chosen: Tensor) -> Revision:
        """See `Revising`."""
        masked = view.masked & ~chosen
        return Revision(commit(statistics, view, chosen), masked, ~masked.any(1))


def commit(statistics: Statistics, view: View, chosen: Tensor) -> Tensor:
    """The view's tokens with the chosen predictions written: `[rows, columns]`."""
    return statistics.token.where(chosen, view.tokens)
