"""What may still change of the tokens that were written."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.sampling.statistics import Need, Statistics
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock


@dataclass(frozen=True)
class Revision:
    """A view after a step."""

    tokens: Tensor
    """[rows, columns] int64: what stands at the masked and editable positions now; elsewhere it does not count."""
    masked: Tensor
    """[rows, columns] bool: open positions of the current block now. Only masked and editable ones may be."""
    done: Tensor
    """[rows] bool: the block is finished: nothing is masked, and the editor changes nothing more."""


class RunningEditor(Protocol):
    """An editor at work on one group of slots."""

    def revise(self, statistics: Statistics, view: ActiveBlock, chosen: Tensor) -> Revision:
        """What becomes of a view whose schedule chose to commit `chosen` `[rows, columns]`.

        It must make progress: every row ends its block after finitely many steps. A row with masks of which none is
        chosen was only prefilled: it stays as it is.
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

    @property
    def operations(self) -> Collection[int]:
        """Ids that are not text but operations on it: chosen like tokens, carried out, never written."""
        ...

    def start(self, slots: int, seq: int) -> RunningEditor:
        """The rule at work; see `Schedule.start`."""
        ...


@dataclass(frozen=True)
class NoEditor:
    """What is written stays."""

    needs = frozenset[Need]()
    edits = False
    reach = 0
    shadow = False
    operations = ()

    def start(self, slots: int, seq: int) -> RunningEditor:
        """See `Editor`."""
        return self

    def revise(self, statistics: Statistics, view: ActiveBlock, chosen: Tensor) -> Revision:
        """See `Revising`."""
        masked = view.masked & ~chosen
        return Revision(commit(statistics, view, chosen), masked, ~masked.any(1))


def commit(statistics: Statistics, view: ActiveBlock, chosen: Tensor) -> Tensor:
    """The view's tokens with the chosen predictions written: `[rows, columns]`."""
    return statistics.token.where(chosen, view.tokens)


def require_in_range(edit_threshold: float, max_post_steps: int) -> None:
    """Raises: ConfigError: a setting that editors share is out of range."""
    if not 0 <= edit_threshold <= 1:
        raise ConfigError(f"editor.edit_threshold: {edit_threshold} must lie between 0 and 1; it is a probability")
    if max_post_steps < 0:
        raise ConfigError(f"editor.max_post_steps: {max_post_steps} must not be negative")


def never_written(model: ModelConfig, editor: Editor) -> tuple[int, ...]:
    """Ids that a reader must leave out: the mask token, and the model's operations where the editor knows none."""
    operations = [i for i in (model.delete_token_id, model.insert_token_id) if i is not None]
    return (model.mask_token_id, *sorted(set(operations) - set(editor.operations)))


def trained_for_editing(objective: ObjectiveConfig) -> bool:
    """Whether a model learnt to correct written tokens. One that did not says nothing sensible at those positions."""
    return objective.replace_ratio > 0
