"""What is run in a step, and whose keys and values from earlier passes are trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock


@dataclass(frozen=True)
class CachePlan:
    """Of each row, int64 `[rows]`: run positions [low, high), each seeing the keys [0, keys)."""

    low: Tensor
    high: Tensor
    keys: Tensor


class Cache(Protocol):
    """Settings of a rule. A row whose plan has low 0 and high = keys is run whole and trusts nothing kept."""

    keeps: bool
    """Whether keys and values are kept at all."""
    causal: bool
    """For block-causal models (True), whose keys never depend on what lies behind their block; or for the others."""

    def plan(self, view: ActiveBlock, valid: Tensor) -> CachePlan:
        """What to run. It must cover [view.first, view.end) of each row.

        Args:
            view: the rows.
            valid: int64 `[rows]`; keys below it are those of the tokens that stand there (block-causal models only).
        """
        ...


@dataclass(frozen=True)
class NoCache:
    """Run the whole sequence in every step: exact."""

    keeps = False
    causal = False

    def plan(self, view: ActiveBlock, valid: Tensor) -> CachePlan:
        """See `Cache`."""
        return _whole(view)


@dataclass(frozen=True)
class Recompute:
    """The same for a block-causal model: everything up to the end of the block, which is all it can see."""

    keeps = False
    causal = True

    def plan(self, view: ActiveBlock, valid: Tensor) -> CachePlan:
        """See `Cache`."""
        return CachePlan(torch.zeros_like(view.end), view.end, view.end)


@dataclass(frozen=True)
class PrefixCache:
    """Keys before the block are kept from its first step (Fast-dLLM, arXiv 2505.22618): approximate."""

    keeps = True
    causal = False
    refresh_every: int | None = None
    """Steps in a block after which the whole sequence is run again; None = at the block's first step only."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: a setting is out of range."""
        _require(refresh_every=(self.refresh_every, 1))

    def plan(self, view: ActiveBlock, valid: Tensor) -> CachePlan:
        """See `Cache`."""
        return _refreshed(CachePlan(view.first, view.length, view.length), view, self.refresh_every)


@dataclass(frozen=True)
class DualCache:
    """Keys before and behind the block are kept from its first step (Fast-dLLM, arXiv 2505.22618): approximate.

    With `before` and `behind` that many neighbours of the block are run too (vicinity refresh; dInfer, arXiv
    2510.08666), and the first `warm_up` steps of a sequence run all of it.
    """

    keeps = True
    causal = False
    before: int = 0
    behind: int = 0
    warm_up: int = 0
    refresh_every: int | None = None
    """As for `PrefixCache`."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: a setting is out of range."""
        _require(
            before=(self.before, 0),
            behind=(self.behind, 0),
            warm_up=(self.warm_up, 0),
            refresh_every=(self.refresh_every, 1),
        )

    def plan(self, view: ActiveBlock, valid: Tensor) -> CachePlan:
        """See `Cache`."""
        low = (view.first - self.before).clamp(min=0)
        high = torch.minimum(view.end + self.behind, view.length)
        plan = _refreshed(CachePlan(low, high, view.length), view, self.refresh_every)
        return _where(view.step < self.warm_up, _whole(view), plan)


@dataclass(frozen=True)
class VicinityCache(DualCache):
    """The dual cache with dInfer's settings: 16 neighbours on either side, and a warm-up.

    dInfer's 4 steps of warm-up keep nothing, and the one after them fills its cache: 5 in all that run the whole.
    """

    before: int = 16
    behind: int = 16
    warm_up: int = 5


@dataclass(frozen=True)
class RefreshedCache(DualCache):
    """The dual cache, refreshed every so many steps besides (dKV-Cache, arXiv 2505.15781, has 4 to 16)."""

    refresh_every: int | None = 8


@dataclass(frozen=True)
class BlockCausalCache:
    """The keys of finished blocks are kept: exact, for a block-causal model.

    A block's keys are those of its final tokens only once it was run with them, which the first pass of the next block
    does besides: a sequence takes no more passes than it has steps. Text of more than `prefill` positions before a
    block (a prompt, or what stands between two gaps) is run in pieces of that many, of whole blocks and at least one,
    before its first step.
    """

    keeps = True
    causal = True
    prefill: int = 8192

    def __post_init__(self) -> None:
        """Raises: ConfigError: a setting is out of range."""
        _require(prefill=(self.prefill, 1))

    def plan(self, view: ActiveBlock, valid: Tensor) -> CachePlan:
        """See `Cache`."""
        low = torch.minimum(valid, view.first)
        return CachePlan(low, view.end, view.end)


def _whole(view: ActiveBlock) -> CachePlan:
    return CachePlan(torch.zeros_like(view.length), view.length, view.length)


def _refreshed(plan: CachePlan, view: ActiveBlock, every: int | None) -> CachePlan:
    """The plan, but the whole sequence at the first step of a block and every so many steps of it."""
    since = view.step_in_block if every is None else view.step_in_block % every
    return _where(since == 0, _whole(view), plan)


def _where(condition: Tensor, one: CachePlan, other: CachePlan) -> CachePlan:
    return CachePlan(
        torch.where(condition, one.low, other.low),
        torch.where(condition, one.high, other.high),
        torch.where(condition, one.keys, other.keys),
    )


def _require(**settings: tuple[int | None, int]) -> None:
    """Raises: ConfigError: a value (of each name the first) lies below the least one (the second); None passes."""
    for name, (value, least) in settings.items():
        if value is not None and value < least:
            raise ConfigError(f"cache.{name}: at least {least}, found {value}")
