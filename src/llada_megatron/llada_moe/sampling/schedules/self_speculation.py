"""Self-speculation: the settings of drafting a block by diffusion and verifying it by the model's own causal pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llada_megatron.llada_moe.sampling.schedules.schedule import Stateless, require_at_least
from llada_megatron.llada_moe.sampling.statistics import Statistics
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock


@dataclass(frozen=True)
class SelfSpeculation(Stateless):
    """Draft a block of masks behind the text, verify it causally, keep the longest prefix on which both agree.

    For models that learn both (objective `joint`; Nemotron-Labs-Diffusion). What is kept are the tokens of the causal
    pass, with those of decoding token by token: drafts decide how many come at a time. `speculation.SpeculativeGroup`
    carries it out, in the place of blocks whose positions a schedule selects.
    """

    draft_length: int | None = None
    """Masks of a draft; None = the block size of the training. 0 = none: the text is decoded token by token."""
    draft_passes: int = 1
    """Passes that fill a draft: each commits an equal share of its positions, the most confident ones."""
    ahead: bool = True
    """A verifying pass drafts the next block too, which is used if the whole draft is accepted."""

    def __post_init__(self) -> None:
        """Raises: ConfigError: a setting out of range."""
        require_at_least("draft_length", self.draft_length, 0)
        require_at_least("draft_passes", self.draft_passes, 1)

    def select(self, statistics: Statistics, block: ActiveBlock) -> Tensor:
        """Never asked: a draft is no block whose positions are committed for good."""
        raise TypeError("self-speculation is run by a SpeculativeGroup")
