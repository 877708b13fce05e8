"""Autoregression: predict each next token. The baseline of a diffusion model, and what its AR parents learnt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llada_megatron.llada_moe.config.objective import check_plain_text
from llada_megatron.llada_moe.config.parsing import Refuse
from llada_megatron.llada_moe.objectives.interface import Objective, register

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llada_megatron.llada_moe.config.run import RunConfig
    from llada_megatron.llada_moe.data.batch import Row
    from llada_megatron.llada_moe.data.packing import Split
    from llada_megatron.llada_moe.model.patterns import AttentionPattern
    from llada_megatron.llada_moe.objectives.interface import RowMaker


@register("autoregressive")
class Autoregressive(Objective):
    """Causal attention, the next token of each position, no noise."""

    fills_masks = False

    def rows(self, run: RunConfig, split: Split, vocab_size: int) -> RowMaker:
        """Rows do not depend on the split: there is no noise."""
        return lambda tokens, boundaries, at: autoregressive_row(tokens, boundaries)

    def pattern(self, step: int) -> AttentionPattern:
        """Causal at every step."""
        from llada_megatron.llada_moe.model.patterns import CAUSAL

        return CAUSAL

    @property
    def loss_is_bound(self) -> bool:
        """Divided by its predicted tokens the loss is the text's exact cost."""
        return self.config.normalization in ("all_tokens", "masked_tokens")

    @property
    def validation_is_bound(self) -> bool:
        """Always: the sum over the predicted tokens is divided by their number."""
        return True

    def description(self) -> str:
        """The loss in a few words."""
        return "cross-entropy of the next token"

    def check(self, refuse: Refuse) -> None:
        """Keys that only noise and blocks read must keep their defaults, and text has no answers."""
        check_plain_text(self.config, refuse)
        self.check_causal(refuse)

    def check_causal(self, refuse: Refuse) -> None:
        """Keys that only noise and blocks read must keep their defaults."""
        block, replaced = self.config.block_size, self.config.replace_ratio
        if block is not None:
            why = f"{block} with kind {self.kind}, whose attention is causal; remove the block size"
            refuse("objective.block_size", why)
        if 0 < replaced < 1:
            why = f"{replaced} with kind {self.kind}, which has no noise; remove the replace ratio"
            refuse("objective.replace_ratio", why)
        for key in ("complementary_masks", "mask_embedding_noise"):
            if getattr(self.config, key):
                refuse(f"objective.{key}", f"kind {self.kind} masks no token; remove {key}")


def autoregressive_row(tokens: NDArray[np.int64], boundaries: NDArray[np.int32]) -> Row:
    """A sequence [seq] whose labels are the next tokens; the last position of each segment has none."""
    import numpy as np

    from llada_megatron.llada_moe.data.batch import Row

    labels = np.append(tokens[1:], tokens[-1])
    weights = np.ones(len(tokens), np.float32)
    weights[boundaries[1:] - 1] = 0.0
    return Row(tokens, labels, weights, boundaries, 1.0, int(np.count_nonzero(weights)))
