"""Token editing of LLaDA2.1: sampled tokens are replaced where the model now predicts another one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.sampling.editors.editor import Revision, RunningEditor, require_in_range
from llada_megatron.llada_moe.sampling.statistics import Need, Statistics
from llada_megatron.llada_moe.sampling.token_buffer import ActiveBlock


@dataclass(frozen=True)
class TokenEditing:
    """Replace a sampled token by another prediction more probable than a threshold (LLaDA2.1 report, "T2T").

    A block ends with the first step that changes nothing, or after `max_post_steps`. The threshold for masks is that of
    the schedule. The rule needs a model that was trained on replaced tokens (`objective.replace_ratio`, or
    `objective.editing` of block diffusion).
    """

    edit_threshold: float = 0.5
    """Probability above which a token is replaced; published: 0.5 (quality), 0.0 (speed)."""
    max_post_steps: int = 16
    """Steps in a block that begin without any mask in it."""
    reach: int = 0
    """Blocks before the current one that are edited too (multi-block editing). They are run again in every step.

    Under block-causal attention a block does not see later ones, so it changes later only if it ended by
    `max_post_steps` before it was settled. The report does not say how its model handles this.
    """

    needs = frozenset[Need]()
    edits = True
    shadow = False
    operations = ()

    def __post_init__(self) -> None:
        """Raises: ConfigError: a setting is out of range."""
        require_in_range(self.edit_threshold, self.max_post_steps)
        if self.reach < 0:
            raise ConfigError(f"editor.reach: {self.reach} must not be negative; 0 edits the current block only")

    def start(self, slots: int, seq: int) -> RunningEditor:
        """Implements `Editor.start`."""
        return _RunningTokenEditing(self, slots)


class _RunningTokenEditing:
    def __init__(self, settings: TokenEditing, slots: int) -> None:
        self._settings = settings
        self._post = torch.zeros(slots, dtype=torch.int64)

    def revise(self, statistics: Statistics, block: ActiveBlock, chosen: Tensor) -> Revision:
        """Implements `RunningEditor.revise`."""
        sure = statistics.confidence > self._settings.edit_threshold
        replaced = block.editable & sure & (statistics.token != block.tokens)
        written = chosen | replaced
        masked = block.masked & ~chosen
        post = torch.where(block.step_in_block == 0, 0, self._post[block.slot]) + (~block.masked.any(1)).long()
        self._post[block.slot] = post
        settled = ~written.any(1) | (post >= self._settings.max_post_steps)
        return Revision(statistics.token.where(written, block.tokens), masked, ~masked.any(1) & settled)
