"""What is learnt: the keys of `objective`, and what cannot work.

Source named below: P8B = arXiv 2502.09992 and the GUIDELINES of ML-GSAI/LLaDA.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from llada_megatron.llada_moe.config.parsing import VARIANTS, Refuse


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is learnt. The keys of noise and the block size are for objectives that mask."""

    kind: str = "diffusion"
    """Which objective of `llada_moe.objectives`, each a file there."""
    block_size: int | None = None
    """Attention is full inside blocks of this many positions, counted from the start of each document, and causal
    between them; null = full (LLaDA2: 32)."""
    time_sampling: Literal["uniform", "stratified"] = "uniform"
    """t per sequence: independent (P8B training code), or one stratum of [0, 1) per sequence of the global batch."""
    epsilon: float = 1e-3
    """Mask ratio p = (1 - epsilon) t + epsilon (P8B)."""
    mask_ratio_min: float = 0.0
    mask_ratio_max: float = 1.0
    """Band that t is drawn from (LLaDA2 SFT: 0.3-0.8)."""
    complementary_masks: bool = False
    """Samples 2i and 2i + 1 are one window: the second has the inverse mask, so that each token is predicted once
    (LLaDA2 SFT; its report finds that it helps on less than 100 billion tokens). The band must be a to 1 - a, and the
    mask ratio is p = (1 - epsilon) t + epsilon / 2, so that the second sample's 1 - p has the same range."""
    mask_embedding_noise: float = 0.0
    """Standard deviation of Gaussian noise on the embedding of each masked token, which falls linearly to 0 over
    mask_embedding_noise_steps: the mask token of an autoregressive model has an embedding near 0, and gradients explode
    (LLaDA2, which does not publish the deviation). 0 = none."""
    mask_embedding_noise_steps: int = 0
    """Steps that have it."""
    random_length_probability: float = 0.01
    """Share of sequences cut to a length drawn from U{1..sequence_length} (P8B: 1 %)."""
    normalization: Literal["all_tokens", "answer_length", "masked_tokens", "conversations"] = "all_tokens"
    """What the weighted cross-entropy is divided by (P8B: all tokens of the batch); masked_tokens = the supervised.
    answer_length (P8B's fine-tuning) and conversations are for samples with prompts and answers: kind sft."""
    replace_ratio: float = 0.0
    """Training for editing, as LLaDA2.1 has it: this share of the tokens that are not masked is shown as another,
    random token, and all that are not masked are supervised too, with weight 1: which are wrong, and what they should
    be. 0 = off. LLaDA2.1's own rate is not published. Block diffusion has a section `editing` instead."""

    @property
    def trains_editing(self) -> bool:
        """Whether the model learns to correct tokens. Its predictions at written positions mean nothing otherwise."""
        return self.replace_ratio > 0


def check_noise(objective: ObjectiveConfig, refuse: Refuse) -> None:
    """Noise that is a probability and never divides by zero."""
    if not 0 <= objective.replace_ratio < 1:
        refuse("objective.replace_ratio", f"{objective.replace_ratio} must be at least 0 and less than 1")
    low, high = objective.mask_ratio_min, objective.mask_ratio_max
    if not 0 <= low < high <= 1:
        refuse(
            "objective.mask_ratio_min",
            f"the band {low} to {high} must satisfy 0 <= mask_ratio_min < mask_ratio_max <= 1",
        )
    if not 0 <= objective.epsilon < 1:
        refuse("objective.epsilon", f"{objective.epsilon} must be at least 0 and less than 1")
    elif objective.epsilon == 0 and low == 0:
        refuse(
            "objective.epsilon",
            "0 with mask_ratio_min 0 lets the mask ratio be 0, and the loss divides by it; the published value is 1e-3",
        )
    if not 0 <= objective.random_length_probability <= 1:
        refuse("objective.random_length_probability", f"{objective.random_length_probability} must lie between 0 and 1")


def check_pairs(objective: ObjectiveConfig, global_batch_size: int, refuse: Refuse) -> None:
    """Complementary masks: both of a pair are in the band and in one global batch (`global_batch_size` even)."""
    if not objective.complementary_masks:
        return
    low, high = objective.mask_ratio_min, objective.mask_ratio_max
    if not math.isclose(low + high, 1.0):
        refuse(
            "objective.complementary_masks",
            f"the inverse of a mask of ratio t has ratio 1 - t, but 1 - mask_ratio_min {low} is not mask_ratio_max "
            f"{high}; use 0.3 to 0.7, for example",
        )
    if global_batch_size % 2:
        refuse(
            "training.global_batch_size",
            f"{global_batch_size} is odd, and objective.complementary_masks makes pairs of samples; use "
            f"{global_batch_size + 1}",
        )


def check_embedding_noise(objective: ObjectiveConfig, refuse: Refuse) -> None:
    """A deviation, and steps that have it, or neither."""
    std, steps = objective.mask_embedding_noise, objective.mask_embedding_noise_steps
    if not 0 <= std < math.inf:
        refuse("objective.mask_embedding_noise", f"{std} must be a number, 0 or more")
    if steps < 0:
        refuse("objective.mask_embedding_noise_steps", f"{steps} must not be negative")
    elif (std > 0) != (steps > 0):
        refuse(
            "objective.mask_embedding_noise_steps",
            f"{steps} with mask_embedding_noise {std}: give both, for the first steps of a conversion, or neither",
        )


def check_plain_text(objective: ObjectiveConfig, refuse: Refuse) -> None:
    """For objectives that read prepared text: nothing may be divided by the length or the number of answers."""
    if objective.normalization in ("answer_length", "conversations"):
        refuse(
            "objective.normalization",
            f"{objective.normalization} needs samples with a prompt and an answer, and prepared text has none; use "
            "all_tokens, or fine-tune on conversations (kind sft)",
        )


def _class_of_kind(values: dict[str, str]) -> type[ObjectiveConfig]:
    from llada_megatron.llada_moe.objectives import config_class  # its files import this one

    return config_class(values.get("kind", ObjectiveConfig.kind))


VARIANTS[ObjectiveConfig] = _class_of_kind
