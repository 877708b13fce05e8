"""What a schedule is, and the choices by rank that most of them make."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import torch
from torch import Tensor

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.sampling.statistics import Need, Statistics
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock


class RunningSchedule(Protocol):
    """A schedule at work on one group of slots; what it remembers of them is its own."""

    def reach(self, view: ActiveBlock) -> Tensor | None:
        """Where the model stops looking in this step, int64 `[rows]`; None = nowhere before the row's end."""
        ...

    def select(self, statistics: Statistics, view: ActiveBlock) -> Tensor:
        """Positions to commit: bool `[rows, columns]`, at least one of every row that has masked ones, all masked.

        `statistics` is `[rows, columns]`; only what it says of asked positions (masked, editable) counts.
        """
        ...


class Schedule(Protocol):
    """Settings of a rule that chooses the positions to commit."""

    @property
    def needs(self) -> Collection[Need]:
        """Statistics that the rule reads beside token and confidence."""
        ...

    def start(self, slots: int, seq: int) -> RunningSchedule:
        """The rule at work on sequences of up to `seq` positions in `slots` slots.

        A slot whose row in a view is at `step` 0 holds a new sequence: what was remembered of it counts no more.
        """
        ...


class Stateless:
    """A schedule that remembers nothing is at work as it is."""

    needs: Collection[Need] = frozenset()

    def start(self, slots: int, seq: int) -> RunningSchedule:
        """See `Schedule`."""
        return self  # type: ignore[return-value]

    def reach(self, view: ActiveBlock) -> Tensor | None:
        """See `Running`."""
        return None


def best(priority: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """The `count` `[rows]` positions of highest priority among some, the leftmost of equals; all `[rows, columns]`."""
    ranked = comparable(priority, among).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(ranked).scatter_(1, ranked, torch.arange(ranked.shape[1]).expand_as(ranked))
    return among & (rank < count[:, None])


def top(priority: Tensor, among: Tensor) -> Tensor:
    """The position of highest priority among some of each row, the leftmost of equals; all `[rows, columns]`."""
    first = comparable(priority, among).argmax(1, keepdim=True)
    return among & (torch.arange(among.shape[1]) == first)


def comparable(priority: Tensor, among: Tensor) -> Tensor:
    """Priorities as float64, -inf outside of `among` and nowhere else: not even a NaN keeps a row from a commit."""
    lowest = torch.finfo(torch.float64).min
    return priority.double().nan_to_num(nan=lowest, neginf=lowest).masked_fill(~among, -torch.inf)


def require_share(name: str, value: float) -> None:
    """Raises: ConfigError: a probability outside of [0, 1]."""
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"schedule.{name}: a probability lies between 0 and 1, found {value}")


def require_at_least(name: str, value: float | None, least: float) -> None:
    """Raises: ConfigError: a setting that is too small; None passes."""
    if value is not None and not value >= least:
        raise ConfigError(f"schedule.{name}: at least {least}, found {value}")
