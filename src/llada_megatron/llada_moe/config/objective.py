"""What is learnt: the keys of `objective`, and what cannot work.

Source named below: P8B = arXiv 2502.09992 and the GUIDELINES of ML-GSAI/LLaDA.
"""

from __future__ import annotations

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
    random_length_probability: float = 0.01
    """Share of sequences cut to a length drawn from U{1..sequence_length} (P8B: 1 %)."""
    normalization: Literal["all_tokens", "answer_length", "masked_tokens"] = "all_tokens"
    """What the weighted cross-entropy is divided by (P8B: all tokens of the batch); masked_tokens = the supervised.
    answer_length (P8B's fine-tuning) is for samples with prompts and answers, which prepared text does not have."""
    replace_ratio: float = 0.0
    """Training for editing, as LLaDA2.1 has it: this share of the tokens that are not masked is shown as another,
    random token, and all that are not masked are supervised too, with weight 1: which are wrong, and what they should
    be. 0 = off. LLaDA2.1's own rate is not published."""


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


def check_plain_text(objective: ObjectiveConfig, refuse: Refuse) -> None:
    """For objectives that read prepared text: nothing may be divided by the length of an answer."""
    if objective.normalization == "answer_length":
        refuse(
            "objective.normalization",
            "answer_length needs samples with a prompt and an answer, and prepared text has none; use all_tokens",
        )


def _class_of_kind(values: dict[str, str]) -> type[ObjectiveConfig]:
    from llada_megatron.llada_moe.objectives import config_class  # its files import this one

    return config_class(values.get("kind", ObjectiveConfig.kind))


VARIANTS[ObjectiveConfig] = _class_of_kind
