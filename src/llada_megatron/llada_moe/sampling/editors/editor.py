"""What an editor is: a rule by which tokens that were already sampled may still change."""

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
    """The state of an active block after a step."""

    tokens: Tensor
    """[rows, columns] int64: the new tokens of masked and editable positions; values elsewhere are ignored."""
    masked: Tensor
    """[rows, columns] bool: open positions after the step. Only masked and editable positions may be open."""
    done: Tensor
    """[rows] bool: the block is finished, that is, nothing is masked and the editor makes no more changes."""


class RunningEditor(Protocol):
    """An editor while it runs on one group of sequences, with what it remembers of them."""

    def revise(self, statistics: Statistics, block: ActiveBlock, chosen: Tensor) -> Revision:
        """The active block after a step in which the schedule chose to commit the positions `chosen`.

        Every row must finish its block after finitely many steps. A row that has masks of which none is chosen was
        only prefilled, and must stay as it is.

        Args:
            statistics: `[rows, columns]`.
            block: the active block before the step.
            chosen: bool `[rows, columns]`, masked positions to be committed.
        """
        ...


class Editor(Protocol):
    """Settings of a rule that changes sampled tokens."""

    @property
    def needs(self) -> Collection[Need]:
        """Statistics that the rule uses besides token and confidence."""
        ...

    @property
    def edits(self) -> bool:
        """Whether the output layer runs on sampled positions too."""
        ...

    @property
    def reach(self) -> int:
        """How many blocks before the current one may be changed."""
        ...

    @property
    def shadow(self) -> bool:
        """Whether the logits of sampled positions come from their shadows, mask tokens at the same positions.

        See `model.windows`.
        """
        ...

    @property
    def operations(self) -> Collection[int]:
        """Ids that stand for operations on the text: they are predicted like tokens, but carried out, never written."""
        ...

    def start(self, slots: int, seq: int) -> RunningEditor:
        """Begin to edit sequences of up to `seq` positions in `slots` slots; compare `Schedule.start`."""
        ...


@dataclass(frozen=True)
class NoEditor:
    """Sampled tokens never change."""

    needs = frozenset[Need]()
    edits = False
    reach = 0
    shadow = False
    operations = ()

    def start(self, slots: int, seq: int) -> RunningEditor:
        """Implements `Editor.start`; there is nothing to remember."""
        return self

    def revise(self, statistics: Statistics, block: ActiveBlock, chosen: Tensor) -> Revision:
        """Implements `RunningEditor.revise`."""
        masked = block.masked & ~chosen
        return Revision(commit(statistics, block, chosen), masked, ~masked.any(1))


def commit(statistics: Statistics, block: ActiveBlock, chosen: Tensor) -> Tensor:
    """The tokens of the block with the predictions at the chosen positions put in, `[rows, columns]`."""
    return statistics.token.where(chosen, block.tokens)


def require_in_range(edit_threshold: float, max_post_steps: int) -> None:
    """Check the settings that several editors have.

    Raises:
        ConfigError: one is out of range.
    """
    if not 0 <= edit_threshold <= 1:
        raise ConfigError(f"editor.edit_threshold: {edit_threshold} must lie between 0 and 1; it is a probability")
    if max_post_steps < 0:
        raise ConfigError(f"editor.max_post_steps: {max_post_steps} must not be negative")


def never_written(model: ModelConfig, editor: Editor) -> tuple[int, ...]:
    """Ids that must never be sampled: the mask token, and the model's operations that the editor does not carry out."""
    operations = [i for i in (model.delete_token_id, model.insert_token_id) if i is not None]
    return (model.mask_token_id, *sorted(set(operations) - set(editor.operations)))


def trained_for_editing(objective: ObjectiveConfig) -> bool:
    """Whether a model was trained to correct tokens. Predictions of another one at sampled positions mean nothing."""
    return objective.trains_editing
