"""Masked diffusion: predict the masked tokens of a corrupted sequence, each weighted by 1 / mask ratio.

The loss of LLaDA (arXiv 2502.09992, eq. 3): E_t E_mask [ (1/p) sum of -log p(token) over the masked positions ], with
attention in both directions, or in both inside blocks and backwards between them (LLaDA2).
"""

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
    from llada_megatron.llada_moe.diffusion.noise import Corruption, ReplacementVocabulary, SampleCoordinates
    from llada_megatron.llada_moe.model.patterns import AttentionPattern
    from llada_megatron.llada_moe.objectives.interface import RowMaker


@register("diffusion")
class MaskedDiffusion(Objective):
    """Masks drawn by the forward process of `diffusion.noise`; with a replace ratio, wrong tokens are put right too."""

    fills_masks = True

    def rows(self, run: RunConfig, split: Split, vocab_size: int) -> RowMaker:
        """Noise is a function of the seed and the sample's coordinates; validation has the whole range of t."""
        from llada_megatron.llada_moe.diffusion.noise import ForwardProcess, ReplacementVocabulary

        noise = ForwardProcess(self.config, run.training.seed, run.training.global_batch_size, split)
        vocabulary = None
        if self.config.replace_ratio:
            vocabulary = ReplacementVocabulary(vocab_size, run.model.special_ids)

        def make(tokens: NDArray[np.int64], boundaries: NDArray[np.int32], at: SampleCoordinates) -> Row:
            corruption = noise.corrupt(at, len(tokens))
            return diffusion_row(tokens, boundaries, corruption, run.model.mask_token_id, vocabulary)

        return make

    def has_pairs(self, split: Split) -> bool:
        """With complementary masks, in training."""
        return self.config.complementary_masks and split == "train"

    def embedding_noise(self, step: int) -> float:
        """It falls linearly from `mask_embedding_noise`, and is gone after `mask_embedding_noise_steps`."""
        steps = self.config.mask_embedding_noise_steps
        return self.config.mask_embedding_noise * (1.0 - step / steps) if step < steps else 0.0

    def pattern(self, step: int) -> AttentionPattern:
        """Full, or full inside blocks of `objective.block_size` and causal between them."""
        from llada_megatron.llada_moe.model.patterns import AttentionPattern

        return AttentionPattern(self.config.block_size)

    @property
    def supervised_share(self) -> float:
        """The mean mask ratio; all positions where tokens are replaced."""
        return 1.0 if self.config.trains_editing else (self.config.mask_ratio_min + self.config.mask_ratio_max) / 2

    @property
    def loss_is_bound(self) -> bool:
        """The negative evidence lower bound per token needs the whole range of t, only masked tokens supervised, and
        the sum divided by all tokens."""
        whole_range = (self.config.mask_ratio_min, self.config.mask_ratio_max) == (0.0, 1.0)
        return whole_range and not self.config.trains_editing and self.config.normalization == "all_tokens"

    @property
    def validation_is_bound(self) -> bool:
        """Always: validation draws from the whole range of t, cuts and replaces nothing, and counts all tokens."""
        return True

    @property
    def only_masks_supervised(self) -> bool:
        """Unless tokens are replaced: those that are not masked are supervised then, too."""
        return not self.config.trains_editing

    def description(self) -> str:
        """The loss, with the band of mask ratios and how times are drawn."""
        band = f"{self.config.mask_ratio_min:g} to {self.config.mask_ratio_max:g}"
        return f"cross-entropy of masked tokens, share masked from {band}, {self.config.time_sampling} times"

    def check(self, refuse: Refuse) -> None:
        """A block has positions, and text has no answers."""
        check_plain_text(self.config, refuse)
        block = self.config.block_size
        if block is not None and block <= 0:
            refuse("objective.block_size", f"{block} must be greater than 0; null is full attention")


def diffusion_row(
    tokens: NDArray[np.int64],
    boundaries: NDArray[np.int32],
    noise: Corruption,
    mask_id: int,
    vocabulary: ReplacementVocabulary | None = None,
    shown_weight: float = 1.0,
) -> Row:
    """A masked sequence [seq]: its own tokens are the labels (no shift), weighted 1/p where masked.

    A cut makes the tail a segment of its own, to which no untruncated token attends. Where the noise replaces tokens by
    others of `vocabulary`, all untruncated tokens that are not masked are weighted `shown_weight`, also those shown as
    they are: a model that is only ever asked about wrong tokens would learn that what it sees is wrong. Tokens that the
    model predicts itself are masks until it has (`Row.drafted`).
    """
    import numpy as np

    from llada_megatron.llada_moe.data.batch import Row

    inputs = np.where(noise.mask, mask_id, tokens)
    if noise.ratios is None:
        weights = noise.mask * np.float32(1.0 / noise.ratio if noise.ratio > 0 else 0.0)
    else:
        weights = (noise.mask / np.where(noise.mask, noise.ratios, 1.0)).astype(np.float32)
    drafted = None
    if noise.replacement is not None:
        if vocabulary is None:
            raise ValueError("noise that replaces tokens needs the vocabulary to replace them by")
        others = vocabulary.other(tokens, noise.replacement.choice)
        if noise.replacement.drafted:
            others, drafted = np.full(len(tokens), mask_id), noise.replacement.replaced
        inputs = np.where(noise.replacement.replaced, others, inputs)
        weights[: noise.length] = np.where(noise.mask, weights, np.float32(shown_weight))[: noise.length]
    if noise.length < len(tokens) and noise.length not in boundaries:
        boundaries = np.sort(np.append(boundaries, np.int32(noise.length)))
    return Row(inputs, tokens, weights, boundaries, noise.ratio, noise.length, drafted=drafted)
