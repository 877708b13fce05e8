"""Training for editing: wrong tokens beside masks, the keys of `objective.editing`.

LLaDA2.1 trains on a mixture of masks and of tokens replaced by random ones, LLaDA2.2 also on drafts in which tokens are
missing or too many. Neither report gives shares or ratios: the numbers here are this project's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llada_megatron.llada_moe.config.parsing import Refuse

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.model import ModelConfig

KEY = "objective.editing"


@dataclass(frozen=True, kw_only=True)
class EditingConfig:
    """What is wrong in the noisy copy besides its masks, and what the tokens that are shown weigh."""

    share: float = 0.5
    """Of the sequences, those that have wrong tokens; the others have masks only. 0 = none."""
    replace_ratio: float = 0.1
    """In those sequences, share of the tokens that are not masked that are shown as another, random token (LLaDA2.1).
    All that are not masked are supervised: which are wrong, and what they should be."""
    missing_ratio: float = 0.0
    """Share of the tokens that a block leaves out: the model learns to insert (LLaDA2.2)."""
    surplus_ratio: float = 0.0
    """Random tokens that a block has too many, per token: the model learns to delete (LLaDA2.2)."""
    draft_share: float = 0.0
    """Of the sequences with wrong tokens, those whose wrong tokens are the model's own (the multi-turn forward of
    LLaDA2.1): it predicts some of the tokens that are not masked in a pass of its own, without gradients, and then sees
    its predictions in their place. Nothing else is wrong there. Above 0, each step has one more forward pass."""
    draft_ratio: float = 0.5
    """Share of the tokens that are not masked that the model has predicted itself."""
    weight: float = 1.0
    """Of each token that is not masked in those sequences, beside 1/t of a masked one."""

    @property
    def drafts(self) -> bool:
        """Whether some sequences show what the model has predicted itself."""
        return self.share > 0 and self.draft_share > 0

    @property
    def moves(self) -> bool:
        """Whether text moves inside its blocks, so that the model learns to delete and to insert."""
        return self.missing_ratio > 0 or self.surplus_ratio > 0


def check_editing(editing: EditingConfig | None, refuse: Refuse) -> None:
    """Shares and ratios that are probabilities, something that is wrong, and a weight."""
    if editing is None:
        return
    for key in ("share", "draft_share"):
        if not 0 <= getattr(editing, key) <= 1:
            refuse(f"{KEY}.{key}", f"{getattr(editing, key)} must lie between 0 and 1; it is a share of the sequences")
    for key in ("replace_ratio", "missing_ratio", "surplus_ratio", "draft_ratio"):
        if not 0 <= getattr(editing, key) < 1:
            refuse(f"{KEY}.{key}", f"{getattr(editing, key)} must be at least 0 and less than 1")
    if editing.draft_share > 0 and not editing.draft_ratio:
        refuse(
            f"{KEY}.draft_ratio", f"0 with draft_share {editing.draft_share}: no token is the model's own; ours: 0.5"
        )
    if editing.share > 0 and editing.draft_share < 1 and not editing.replace_ratio and not editing.moves:
        refuse(f"{KEY}.share", f"{editing.share} without a wrong token; give a replace_ratio (ours: 0.1), or share 0")
    if not 0 < editing.weight < math.inf:
        refuse(f"{KEY}.weight", f"{editing.weight} must be greater than 0")


def check_operations(
    editing: EditingConfig | None, model: ModelConfig, largest: int, length: int, refuse: Refuse
) -> None:
    """A model that can say delete and insert, and blocks that end before the window does.

    `largest`: block size of any stage; `length`: of a window.
    """
    if editing is None or not editing.share or not editing.moves:
        return
    key = "missing_ratio" if editing.missing_ratio else "surplus_ratio"
    if model.delete_token_id is None or model.insert_token_id is None:
        refuse(
            f"{KEY}.{key}",
            f"{getattr(editing, key)}, but the model has no delete_token_id and insert_token_id to say so; give it "
            "both (LLaDA2.2: 156930 and 156931), or set missing_ratio and surplus_ratio to 0",
        )
    if largest >= length:
        refuse(
            f"{KEY}.{key}",
            f"{getattr(editing, key)} with a block of {largest}: text moves inside its block, and this one holds the "
            f"whole training.sequence_length {length}; train for it in a run of small blocks",
        )
