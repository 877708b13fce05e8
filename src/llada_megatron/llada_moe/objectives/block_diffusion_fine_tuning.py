"""Supervised fine-tuning in blocks: masked answers beside the clean conversation, `[x_t ; x_0]` (LLaDA2.0, eq. 5).

A block of an answer is predicted from the prompt and the answer before it as they are, not as the noise left them: what
a sampler has when it comes to the block. Blocks are counted from the beginning of each conversation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llada_megatron.llada_moe.config.parsing import Refuse
from llada_megatron.llada_moe.objectives.block_diffusion import check_block_size
from llada_megatron.llada_moe.objectives.block_rows import doubled_row
from llada_megatron.llada_moe.objectives.fine_tuning import FineTuning
from llada_megatron.llada_moe.objectives.interface import register

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.run import RunConfig
    from llada_megatron.llada_moe.data.batch import Row
    from llada_megatron.llada_moe.model.patterns import AttentionPattern


@register("block_diffusion_sft")
class BlockDiffusionFineTuning(FineTuning):
    """The noisy half has the masked answers; nothing of the clean half is learnt."""

    def finished(self, row: Row) -> Row:
        """Both halves."""
        return doubled_row(row, row.labels)

    def pattern(self, step: int) -> AttentionPattern:
        """Over both halves."""
        from llada_megatron.llada_moe.model.patterns import AttentionPattern

        return AttentionPattern(self.config.block_size or 1, doubled=True)

    def sampling_pattern(self, step: int) -> AttentionPattern:
        """Blocks that see themselves and all before."""
        from llada_megatron.llada_moe.model.patterns import AttentionPattern

        return AttentionPattern(self.config.block_size)

    def description(self) -> str:
        """The loss, with its blocks and the band of mask ratios."""
        return f"{super().description()}, in blocks of {self.config.block_size} behind clean ones"

    def check(self, refuse: Refuse) -> None:
        """As of fine-tuning; and there are blocks."""
        super().check(refuse)
        check_block_size(self.config, refuse)

    def check_run(self, run: RunConfig, refuse: Refuse) -> None:
        """Blocks divide the window, and there are several."""
        length, size = run.training.sequence_length, self.config.block_size or 1
        if length % size or length == size:
            refuse(
                "objective.block_size",
                f"{size} is not a part of training.sequence_length {length} that divides it; one block for a whole "
                "conversation is kind sft",
            )
