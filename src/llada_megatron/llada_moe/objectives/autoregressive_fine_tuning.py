"""Supervised fine-tuning of an autoregressive model: the next token, where it belongs to an answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llada_megatron.llada_moe.config.parsing import Refuse
from llada_megatron.llada_moe.objectives.autoregressive import Autoregressive
from llada_megatron.llada_moe.objectives.fine_tuning import (
    FineTuningConfig,
    chat_settings,
    check_conversations,
    conversation_factors,
)
from llada_megatron.llada_moe.objectives.interface import register

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from llada_megatron.llada_moe.config.objective import ObjectiveConfig
    from llada_megatron.llada_moe.config.run import RunConfig
    from llada_megatron.llada_moe.data.batch import Batch, Samples
    from llada_megatron.llada_moe.data.chat_samples import Supervised
    from llada_megatron.llada_moe.data.packing import Split
    from llada_megatron.llada_moe.diffusion.noise import SampleCoordinates
    from llada_megatron.llada_moe.objectives.normalization import TokenCounts


@register("autoregressive_sft")
class AutoregressiveFineTuning(Autoregressive):
    """Causal attention; each token of an answer is predicted from what stands before it."""

    config_class = FineTuningConfig
    config: FineTuningConfig

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        self._remarks: list[str] = []

    def samples(self, run: RunConfig, split: Split) -> Samples:
        """Conversations of the run's sets."""
        from llada_megatron.llada_moe.data.chat_samples import ChatSamples

        per_answer = split == "train" and self.config.normalization == "answer_length"

        def make(tokens: NDArray[np.int64], answer: NDArray[np.bool_], at: SampleCoordinates) -> Supervised:
            return next_answer_token(tokens, answer, 1.0 / max(1, int(answer.sum())) if per_answer else 1.0)

        samples = ChatSamples(run, split, chat_settings(self.config, pairs=False), make)
        self._remarks += samples.remarks()
        return samples

    def remarks(self) -> list[str]:
        """How many conversations are longer than a window."""
        return self._remarks

    def factors(self, counts: TokenCounts, batch: Batch) -> Tensor:
        """As `objective.normalization` says."""
        return conversation_factors(self.config, counts, batch)

    @property
    def loss_is_bound(self) -> bool:
        """Not of whole texts: what is learnt is an answer given its prompt."""
        return False

    @property
    def validation_is_bound(self) -> bool:
        """Not of whole texts: it is the cost of the answers given their prompts, in nats per answer token."""
        return False

    def description(self) -> str:
        """The loss in a few words."""
        return "cross-entropy of the next token of answers given the prompt"

    def check(self, refuse: Refuse) -> None:
        """Keys that only noise and blocks read must keep their defaults."""
        config = self.config
        check_conversations(config, refuse)
        self.check_causal(refuse)
        if config.confidence_coefficient:
            refuse("objective.confidence_coefficient", f"{config.confidence_coefficient} with kind {self.kind}")
        if config.weighting != "inverse":
            refuse("objective.weighting", f"{config.weighting} with kind {self.kind}, which has no mask ratio")


def next_answer_token(tokens: NDArray[np.int64], answer: NDArray[np.bool_], weight: float) -> Supervised:
    """A conversation `[length]` whose labels are the next tokens, learnt where these belong to an answer."""
    import numpy as np

    from llada_megatron.llada_moe.data.chat_samples import Supervised

    weights = np.append(answer[1:], False) * np.float32(weight)
    return Supervised(tokens, np.append(tokens[1:], tokens[-1]), weights.astype(np.float32), 1.0)
