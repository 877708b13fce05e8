"""Rules for the key-value cache: which positions a step runs, and for which ones it uses keys of earlier passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock


@dataclass(frozen=True)
class CachePlan:
    """What each row runs, int64 `[rows]`: the positions [low, high), each of which attends to the keys [0, keys)."""

    low: Tensor
    high: Tensor
    keys: Tensor


class Cache(Protocol):
    """Settings of a rule. A row whose plan has low = 0 and high = keys is run whole and uses no cached keys."""

    keeps: bool
    """Whether keys and values are kept at all."""
    causal: bool
    """Whether the rule is for block-causal models (whose keys never depend on later blocks) or bidirectional ones."""

    def plan(self, block: ActiveBlock, valid: Tensor) -> CachePlan:
        """The positions to run, which must include [block.first, block.end) of each row.

        Args:
            block: the active block.
            valid: int64 `[rows]`; cached keys below this position belong to the present tokens (block-causal models
                only, 0 for others).
        """
        ...


@dataclass(frozen=True)
class NoCache:
    """Run the whole sequence in every step, which is exact."""

    keeps = False
    causal = False

    def plan(self, block: ActiveBlock, valid: Tensor) -> CachePlan:
        """Implements `Cache.plan`."""
        return _whole(block)


@dataclass(frozen=True)
class Recompute:
    """Run everything up to the end of the block in every step, which is all that a block-causal model can see."""

    keeps = False
    causal = True

    def plan(self, block: ActiveBlock, valid: Tensor) -> CachePlan:
        """Implements `Cache.plan`."""
        return CachePlan(torch.zeros_like(block.end), block.end, block.end)


@dataclass(frozen=True)
class PrefixCache:
    """Keep the keys before the block from its first step on (Fast-dLLM, arXiv 2505.22618), which is approximate."""

    keeps = True
    causal = False
    refresh_every: int | None = None
    """Steps in a block after which the whole sequence is run again; None = only at the first step of the block."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: a setting is out of range."""
        _require(refresh_every=(self.refresh_every, 1))

    def plan(self, block: ActiveBlock, valid: Tensor) -> CachePlan:
        """Implements `Cache.plan`."""
        return _refreshed(CachePlan(block.first, block.length, block.length), block, self.refresh_every)


@dataclass(frozen=True)
class DualCache:
    """Keep the keys before and after the block from its first step on (Fast-dLLM, arXiv 2505.22618); approximate.

    As many as `before` and `behind` neighbours of the block are run too (vicinity refresh; dInfer, arXiv 2510.08666),
    and the first `warm_up` steps of a sequence run all of it.
    """

    keeps = True
    causal = False
    before: int = 0
    behind: int = 0
    warm_up: int = 0
    refresh_every: int | None = None
    """After how many steps the kept keys are computed anew, as `PrefixCache.refresh_every` says."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: a setting is out of range."""
        _require(
            before=(self.before, 0),
            behind=(self.behind, 0),
            warm_up=(self.warm_up, 0),
            refresh_every=(self.refresh_every, 1),
        )

    def plan(self, block: ActiveBlock, valid: Tensor) -> CachePlan:
        """Implements `Cache.plan`."""
        low = (block.first - self.before).clamp(min=0)
        high = torch.minimum(block.end + self.behind, block.length)
        plan = _refreshed(CachePlan(low, high, block.length), block, self.refresh_every)
        return _where(block.step < self.warm_up, _whole(block), plan)


@dataclass(frozen=True)
class VicinityCache(DualCache):
    """The dual cache with the settings of dInfer: 16 neighbours on either side, and a warm-up.

    dInfer's 4 steps of warm-up keep no keys and the step after them fills its cache, so that 5 steps run the whole
    sequence.
    """

    before: int = 16
    behind: int = 16
    warm_up: int = 5


@dataclass(frozen=True)
class RefreshedCache(DualCache):
    """The dual cache, with a refresh every few steps (dKV-Cache, arXiv 2505.15781, uses 4 to 16)."""

    refresh_every: int | None = 8


@dataclass(frozen=True)
class BlockCausalCache:
    """Keep the keys of finished blocks, which is exact for a block-causal model.

    The keys of a block are those of its final tokens only after it was run with them. The first pass of the next block
    does that too, so that a sequence takes no more passes than it has steps. If more than `prefill` positions precede
    a block (a prompt, or the text between two gaps), they are run in pieces of at most that length, each of whole
    blocks and at least one, before the first step of the block.
    """

    keeps = True
    causal = True
    prefill: int = 8192

    def __post_init__(self) -> None:
        """Raises: ConfigError: a setting is out of range."""
        _require(prefill=(self.prefill, 1))

    def plan(self, block: ActiveBlock, valid: Tensor) -> CachePlan:
        """Implements `Cache.plan`."""
        low = torch.minimum(valid, block.first)
        return CachePlan(low, block.end, block.end)


def _whole(block: ActiveBlock) -> CachePlan:
    return CachePlan(torch.zeros_like(block.length), block.length, block.length)


def _refreshed(plan: CachePlan, block: ActiveBlock, every: int | None) -> CachePlan:
    """The plan, replaced by the whole sequence at the first step of a block and after every `every` steps of it."""
    since = block.step_in_block if every is None else block.step_in_block % every
    return _where(since == 0, _whole(block), plan)


def _where(condition: Tensor, one: CachePlan, other: CachePlan) -> CachePlan:
    return CachePlan(
        torch.where(condition, one.low, other.low),
        torch.where(condition, one.high, other.high),
        torch.where(condition, one.keys, other.keys),
    )


def _require(**settings: tuple[int | None, int]) -> None:
    """Check settings, given as NAME=(value, least allowed value); None is allowed.

    Raises:
        ConfigError: a value is too small.
    """
    for name, (value, least) in settings.items():
        if value is not None and value < least:
            raise ConfigError(f"cache.{name}: at least {least}, found {value}")
