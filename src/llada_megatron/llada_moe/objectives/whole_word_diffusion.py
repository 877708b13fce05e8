"""Masked diffusion whose masks cover whole words: the tokens of a word are all masked, or none of them is.

A word that is masked in part is guessed from its other tokens rather than from what is said of it. Whole-word masking
is BERT's; for names in diffusion models see DiffER (arXiv 2601.07347). Every token is still masked with probability p
and weighted 1/p, so that the loss is the bound of a decoder that writes a word at once, its tokens independent of each
other. Validation masks tokens, as that of other diffusion models, so that the figures can be compared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llada_megatron.llada_moe.config.parsing import Refuse
from llada_megatron.llada_moe.objectives.interface import register
from llada_megatron.llada_moe.objectives.masked_diffusion import MaskedDiffusion, diffusion_row

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from llada_megatron.llada_moe.config.run import RunConfig
    from llada_megatron.llada_moe.data.batch import Row
    from llada_megatron.llada_moe.data.packing import Split
    from llada_megatron.llada_moe.diffusion.noise import SampleCoordinates
    from llada_megatron.llada_moe.objectives.interface import RowMaker


@register("whole_word_diffusion")
class WholeWordDiffusion(MaskedDiffusion):
    """The noise of `diffusion.noise`, drawn once for each word of the sets' tokenizer."""

    def rows(self, run: RunConfig, split: Split, vocab_size: int) -> RowMaker:
        """In training a function of the seed and the sample's coordinates and words; in validation as without words."""
        if split != "train":
            return super().rows(run, split, vocab_size)
        from llada_megatron.llada_moe.data.set_manifest import tokenizer_of
        from llada_megatron.llada_moe.data.word_starts import WordStarts
        from llada_megatron.llada_moe.diffusion.noise import ForwardProcess

        noise = ForwardProcess(self.config, run.training.seed, run.training.global_batch_size, split)
        starts = WordStarts(tokenizer_of(run.data.sets[0].path))

        def make(tokens: NDArray[np.int64], boundaries: NDArray[np.int32], at: SampleCoordinates) -> Row:
            corruption = noise.corrupt(at, len(tokens), words=starts.words(tokens, boundaries))
            return diffusion_row(tokens, boundaries, corruption, run.model.mask_token_id)

        return make

    def description(self) -> str:
        """The loss, with the band of mask ratios and how times are drawn."""
        return f"{super().description()}, whole words masked"

    def check(self, refuse: Refuse) -> None:
        """Words are masked, and not replaced."""
        super().check(refuse)
        if self.config.replace_ratio:
            refuse("objective.replace_ratio", f"{self.config.replace_ratio} with kind {self.kind}; use kind diffusion")
