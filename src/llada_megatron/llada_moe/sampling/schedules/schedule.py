"""What a schedule is, and the selection by priority that most of them share."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.sampling.statistics import Need, Statistics
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock


class RunningSchedule(Protocol):
    """A schedule while it runs on one group of sequences, with what it remembers of them."""

    def reach(self, block: ActiveBlock) -> Tensor | None:
        """The position before which the model's view ends in this step, int64 `[rows]`; None = the sequence's end."""
        ...

    def select(self, statistics: Statistics, block: ActiveBlock) -> Tensor:
        """The positions to commit, bool `[rows, columns]`: masked ones only, at least one in every row that has any.

        `statistics` is `[rows, columns]`; only its values at positions that had logits (masked, editable) count.
        """
        ...


class Schedule(Protocol):
    """Settings of a rule that chooses the positions to commit."""

    @property
    def needs(self) -> Collection[Need]:
        """Statistics that the rule uses besides token and confidence."""
        ...

    def start(self, slots: int, seq: int) -> RunningSchedule:
        """Begin to schedule sequences of up to `seq` positions in `slots` slots.

        A row at `step` 0 means that its slot holds a new sequence; what was remembered of the slot is void.
        """
        ...


class Stateless:
    """Base of schedules that remember nothing: they are their own `RunningSchedule`."""

    needs: Collection[Need] = frozenset()

    def start(self, slots: int, seq: int) -> RunningSchedule:
        """Implements `Schedule.start`."""
        return self  # type: ignore[return-value]

    def reach(self, block: ActiveBlock) -> Tensor | None:
        """Implements `RunningSchedule.reach`: the model sees the whole sequence."""
        return None


def best(priority: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """In each row the `count` positions of highest priority where `among` is true, the leftmost ones on a tie.

    Args:
        priority: `[rows, columns]`.
        among: bool `[rows, columns]`.
        count: int64 `[rows]`.

    Returns:
        bool `[rows, columns]`.
    """
    ranked = comparable(priority, among).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(ranked).scatter_(1, ranked, torch.arange(ranked.shape[1]).expand_as(ranked))
    return among & (rank < count[:, None])


def top(priority: Tensor, among: Tensor) -> Tensor:
    """As `best`, for one position in each row; all tensors are `[rows, columns]`."""
    first = comparable(priority, among).argmax(1, keepdim=True)
    return among & (torch.arange(among.shape[1]) == first)


def comparable(priority: Tensor, among: Tensor) -> Tensor:
    """Priorities as float64, -inf outside of `among` and only there, so that a row of NaNs still commits a token."""
    lowest = torch.finfo(torch.float64).min
    return priority.double().nan_to_num(nan=lowest, neginf=lowest).masked_fill(~among, -torch.inf)


def require_share(name: str, value: float) -> None:
    """Check a probability.

    Raises:
        ConfigError: it lies outside of [0, 1].
    """
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"schedule.{name}: a probability lies between 0 and 1, found {value}")


def require_at_least(name: str, value: float | None, least: float) -> None:
    """Check a setting; None is allowed.

    Raises:
        ConfigError: it is too small.
    """
    if value is not None and not value >= least:
        raise ConfigError(f"schedule.{name}: at least {least}, found {value}")
