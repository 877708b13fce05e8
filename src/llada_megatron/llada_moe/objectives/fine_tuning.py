"""Supervised fine-tuning: the prompt is shown as it is, the answer is masked, and only masked answer tokens are learnt.

The loss of LLaDA's fine-tuning (arXiv 2502.09992, eq. 5), with the band of mask ratios and the complementary masks of
LLaDA2's, whose reading of a noisy and a clean half is `block_diffusion_fine_tuning`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.config.parsing import Refuse
from llada_megatron.llada_moe.objectives.interface import register
from llada_megatron.llada_moe.objectives.masked_diffusion import MaskedDiffusion

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from llada_megatron.llada_moe.config.run import RunConfig
    from llada_megatron.llada_moe.data.batch import Batch, Row, Samples
    from llada_megatron.llada_moe.data.chat_samples import ChatSettings, ConversationMaker, Supervised
    from llada_megatron.llada_moe.data.packing import Split
    from llada_megatron.llada_moe.diffusion.noise import SampleCoordinates
    from llada_megatron.llada_moe.objectives.normalization import TokenCounts


@dataclass(frozen=True, kw_only=True)
class FineTuningConfig(ObjectiveConfig):
    """Keys of fine-tuning on conversations."""

    random_length_probability: float = 0.0
    """Conversations are not cut at random."""
    normalization: Literal["all_tokens", "answer_length", "masked_tokens", "conversations"] = "answer_length"
    """What the weighted cross-entropy is divided by. all_tokens: answer tokens of the global batch ("token");
    answer_length: each conversation's by its answer, then by the number of conversations ("sequence", P8B);
    conversations: their number alone ("batch"); masked_tokens: the masked answer tokens."""
    answers: Literal["one", "all"] = "one"
    """one: of a conversation with several answers each epoch learns another, and sees nothing behind it (P8B). all:
    every answer at once; under full attention the later turns are seen by the earlier ones."""
    padding: Literal["none", "block", "batch", "window"] = "batch"
    """End-of-text tokens behind the answer that are masked and learnt like it, beyond the first, which always is: up to
    the longest conversation of the global batch (P8B), up to a multiple of block_size (LLaDA2), up to the whole window
    (d1), or none."""
    pack: bool = False
    """Several conversations in one window, which do not see each other."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """Of conversations that are longer than a window: its beginning is learnt, if it holds a part of an answer, or
    nothing."""
    weighting: Literal["inverse", "none"] = "inverse"
    """Weight of a masked token: 1 / mask ratio (P8B), or 1 (LLaDA2's released training code)."""
    confidence_coefficient: float = 0.0
    """Confidence-aware training (LLaDA2.0, eq. 6): what is added to the loss, times the entropies of the masked tokens
    that are predicted right, summed and divided by all masked tokens of the global batch. 0 = off; LLaDA2 documents 2
    for the mean over those that are right alone, which is larger by one over the accuracy."""


def conversation_factors(config: FineTuningConfig, counts: TokenCounts, batch: Batch) -> Tensor:
    """Normalisation of each sequence `[batch]`; weights are already divided by each answer's length where
    `normalization` says so."""
    from llada_megatron.llada_moe.objectives.normalization import normalizer

    kind = config.normalization
    return normalizer("conversations" if kind == "answer_length" else kind, counts, batch)


@register("sft")
class FineTuning(MaskedDiffusion):
    """Masked diffusion over the answers of conversations."""

    config_class = FineTuningConfig
    config: FineTuningConfig

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        self._remarks: list[str] = []

    def samples(self, run: RunConfig, split: Split) -> Samples:
        """Conversations of the run's sets; in validation with every mask ratio."""
        from llada_megatron.llada_moe.data.chat_samples import ChatSamples

        settings = chat_settings(self.config, self.has_pairs(split))
        samples = ChatSamples(run, split, settings, self._maker(run, split), self.finished)
        self._remarks += samples.remarks()
        return samples

    def remarks(self) -> list[str]:
        """How many conversations are longer than a window."""
        return self._remarks

    def finished(self, row: Row) -> Row:
        """The row that a step reads, from that of the masked conversations."""
        return row

    def _maker(self, run: RunConfig, split: Split) -> ConversationMaker:
        from llada_megatron.llada_moe.diffusion.noise import ForwardProcess

        train = split == "train"
        noise = ForwardProcess(self.config, run.training.seed, run.training.global_batch_size, split)
        uniform = train and self.config.weighting == "none"
        per_answer = train and self.config.normalization == "answer_length"

        def make(tokens: NDArray[np.int64], answer: NDArray[np.bool_], at: SampleCoordinates) -> Supervised:
            drawn = noise.corrupt(at, len(tokens))
            weight = (1.0 if uniform else 1.0 / drawn.ratio) / _divisor(answer)
            return masked_answer(tokens, answer & drawn.mask, run.model.mask_token_id, drawn.ratio, weight)

        def _divisor(answer: NDArray[np.bool_]) -> int:
            return max(1, int(answer.sum())) if per_answer else 1

        return make

    def factors(self, counts: TokenCounts, batch: Batch) -> Tensor:
        """As `objective.normalization` says."""
        return conversation_factors(self.config, counts, batch)

    def confidence_factor(self, counts: TokenCounts, batch: Batch) -> float:
        """The coefficient per masked token, for a sum that is divided by the positions of the global batch. The number
        of correct predictions is known after the last forward pass only, too late to divide the first by it."""
        if not self.config.confidence_coefficient or not counts.masked:
            return 0.0
        return self.config.confidence_coefficient * counts.sequences * batch.inputs.shape[1] / counts.masked

    @property
    def supervised_share(self) -> float:
        """The mean mask ratio, as if every token were of an answer: how long prompts are the configuration does not
        say."""
        return (self.config.mask_ratio_min + self.config.mask_ratio_max) / 2

    @property
    def loss_is_bound(self) -> bool:
        """Never: what is learnt is an answer given its prompt, and bits per byte are of whole texts."""
        return False

    @property
    def validation_is_bound(self) -> bool:
        """Not of whole texts: it is the bound of the answers given their prompts, in nats per answer token."""
        return False

    @property
    def only_masks_supervised(self) -> bool:
        """Where a row is one conversation and its weights are 1/p alone."""
        config = self.config
        return not config.pack and config.weighting == "inverse" and config.normalization != "answer_length"

    def description(self) -> str:
        """The loss, with the band of mask ratios."""
        band = f"{self.config.mask_ratio_min:g} to {self.config.mask_ratio_max:g}"
        return f"cross-entropy of masked answer tokens given the prompt, share masked from {band}"

    def check(self, refuse: Refuse) -> None:
        """Keys that conversations do not have, and combinations without meaning."""
        config = self.config
        check_conversations(config, refuse)
        if config.replace_ratio:
            refuse("objective.replace_ratio", f"{config.replace_ratio} with kind {self.kind}, which replaces no tokens")
        if config.confidence_coefficient < 0:
            refuse("objective.confidence_coefficient", f"{config.confidence_coefficient} must be at least 0")


def chat_settings(config: FineTuningConfig, pairs: bool) -> ChatSettings:
    """How conversations become rows."""
    from llada_megatron.llada_moe.data.chat_samples import ChatSettings

    return ChatSettings(
        answers=config.answers,
        padding=config.padding,
        too_long=config.too_long,
        pack=config.pack,
        pairs=pairs,
        block=config.block_size,
    )


def check_conversations(config: FineTuningConfig, refuse: Refuse) -> None:
    """Refuse what does not go with conversations, whatever is learnt of them."""
    if config.random_length_probability:
        why = f"{config.random_length_probability} would cut conversations at random; too_long says what is cut"
        refuse("objective.random_length_probability", why)
    if config.padding == "block" and config.block_size is None:
        refuse("objective.padding", "block without objective.block_size; give a block size, or none, batch or window")
    if config.pack and config.padding in ("batch", "window"):
        refuse("objective.padding", f"{config.padding} with pack fills every window by one conversation; none or block")


def masked_answer(
    tokens: NDArray[np.int64], mask: NDArray[np.bool_], mask_id: int, ratio: float, weight: float
) -> Supervised:
    """A conversation `[length]` with the tokens of `mask` hidden, each learnt with `weight`."""
    import numpy as np

    from llada_megatron.llada_moe.data.chat_samples import Supervised

    weights = np.where(mask, np.float32(weight), np.float32(0.0))
    return Supervised(np.where(mask, mask_id, tokens), tokens, weights, ratio)
