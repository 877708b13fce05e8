"""AdamW and its learning rate over the steps: the keys of `optimizer`, what cannot work, and the rate itself.

Sources named below: P8B = arXiv 2502.09992 and the GUIDELINES of ML-GSAI/LLaDA;
PV2 = arXiv 2608.03457 (LLaDA MoE v2); SMDM = arXiv 2410.18514.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from typing import Literal

from llada_megatron.llada_moe.config.parsing import Refuse


@dataclass(frozen=True, kw_only=True)
class LearningRateConfig:
    """Learning rate over steps: warm-up, constant with drops, decay to the end (warmup-stable-decay)."""

    peak: float
    warmup_steps: int = 0
    drops: list[LearningRateDropConfig] = field(default_factory=list)
    decay_steps: int = 0
    """Length of the decay that ends at the last step of the run."""
    decay_shape: Literal["linear", "cosine", "inverse_sqrt"] = "linear"
    final: float = 0.0


@dataclass(frozen=True, kw_only=True)
class LearningRateDropConfig:
    """From this step on the constant part runs at `value`."""

    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (Megatron's, with the state sharded over data-parallel ranks)."""

    learning_rate: LearningRateConfig
    beta1: float = 0.9
    beta2: float = 0.95
    """PV2, SMDM."""
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """P8B; of matrices: the weights of norms do not decay."""
    clip_grad_norm: float = 1.0
    """SMDM, PV2; 0 = no clipping."""
    main_grads_dtype: Literal["fp32", "bf16"] = "fp32"
    """Type in which gradients are summed over micro-batches and ranks. Here and in the next two, what is not fp32 needs
    Transformer Engine's FusedAdam (a GPU) and training.precision bf16."""
    exp_avg_dtype: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Type of the running mean of the gradients; fp8 and bf16 keep a checkpoint readable by a run with fp32."""
    exp_avg_sq_dtype: Literal["fp32", "bf16", "fp8"] = "fp32"
    """Type of the running mean of their squares."""

    @property
    def low_precision(self) -> list[str]:
        """Which of Adam's tensors are not in fp32: `KEY: TYPE`, in the order of the keys."""
        keys = ("main_grads_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
        return [f"{key}: {getattr(self, key)}" for key in keys if getattr(self, key) != "fp32"]


def check_optimizer(optimizer: OptimizerConfig, steps: int, refuse: Refuse) -> None:
    """AdamW's numbers and the learning rate."""
    for key in ("beta1", "beta2"):
        if not 0 <= getattr(optimizer, key) < 1:
            refuse(f"optimizer.{key}", f"{getattr(optimizer, key)} must be at least 0 and less than 1")
    if optimizer.epsilon <= 0:
        refuse("optimizer.epsilon", f"{optimizer.epsilon} must be greater than 0")
    for key in ("weight_decay", "clip_grad_norm"):
        if getattr(optimizer, key) < 0:
            refuse(f"optimizer.{key}", f"{getattr(optimizer, key)} must not be negative")
    check_learning_rate(
        optimizer.learning_rate, steps, lambda key, message: refuse(f"optimizer.learning_rate.{key}", message)
    )


def check_learning_rate(rate: LearningRateConfig, steps: int, refuse: Refuse) -> None:
    """Warm-up, drops and decay that follow one another within the run's steps."""
    decay_start = steps - rate.decay_steps
    if rate.peak <= 0:
        refuse("peak", f"{rate.peak} must be greater than 0")
    for key in ("warmup_steps", "decay_steps"):
        if getattr(rate, key) < 0:
            refuse(key, f"{getattr(rate, key)} must not be negative")
    if rate.warmup_steps > decay_start:
        refuse(
            "decay_steps",
            f"warmup_steps {rate.warmup_steps} + decay_steps {rate.decay_steps} = "
            f"{rate.warmup_steps + rate.decay_steps} is more than training.steps {steps}",
        )
    for i, drop in enumerate(rate.drops):
        if drop.value <= 0:
            refuse(f"drops.{i}.value", f"{drop.value} must be greater than 0")
        if not rate.warmup_steps <= drop.step < decay_start:
            refuse(
                f"drops.{i}.step",
                f"{drop.step} is outside the constant part, steps {rate.warmup_steps} to {decay_start - 1}",
            )
    for i, (before, after) in enumerate(itertools.pairwise(rate.drops), start=1):
        if after.step <= before.step:
            refuse(
                f"drops.{i}.step",
                f"{after.step} does not come after the drop at step {before.step}; list them in order",
            )
    _check_final(rate, refuse)


def _check_final(rate: LearningRateConfig, refuse: Refuse) -> None:
    start = rate.drops[-1].value if rate.drops else rate.peak
    if not 0 <= rate.final <= start:
        refuse("final", f"{rate.final} must lie between 0 and the rate before the decay, {start}")
    elif rate.final > 0 and rate.decay_steps == 0:
        refuse("final", f"{rate.final} is never reached: decay_steps is 0")
    elif rate.decay_steps > 0 and rate.decay_shape == "inverse_sqrt" and rate.final == 0:
        refuse(
            "final", "an inverse square root never reaches 0; give final a value, or use decay_shape linear or cosine"
        )


def fits(rate: LearningRateConfig, steps: int) -> bool:
    """Whether warm-up, drops and decay lie within a run of so many steps."""
    decay_start = steps - rate.decay_steps
    return rate.warmup_steps <= decay_start and all(drop.step < decay_start for drop in rate.drops)


def scaled(rate: LearningRateConfig, before: int, steps: int) -> LearningRateConfig:
    """The schedule of a run of `before` steps in one of fewer `steps`: each length in proportion, rounded down."""
    return dataclasses.replace(
        rate,
        warmup_steps=rate.warmup_steps * steps // before,
        drops=[LearningRateDropConfig(step=drop.step * steps // before, value=drop.value) for drop in rate.drops],
        decay_steps=max(rate.decay_steps * steps // before, min(rate.decay_steps, 1)),  # or `final` is never reached
    )


def learning_rate(config: LearningRateConfig, step: int, steps: int) -> float:
    """Learning rate of the update number `step` (from 0) in a run of `steps` updates.

    Warm-up rises linearly and reaches `peak` with its last step; the constant part follows `drops`; the decay starts
    from the rate before it and reaches `final` with the last step of the run, where it then stays.

    * linear: start + (final - start) f
    * cosine: final + (start - final) (1 + cos(pi f)) / 2
    * inverse_sqrt: start / sqrt(1 + (start^2 / final^2 - 1) f)

    with f the share of the decay that is done, 1 at the last step.
    """
    if step < config.warmup_steps:
        return config.peak * (step + 1) / config.warmup_steps
    decay_start = steps - config.decay_steps
    start = constant_rate(config, min(step, decay_start - 1))
    if step < decay_start or config.decay_steps == 0:
        return start
    done = min((step - decay_start + 1) / config.decay_steps, 1.0)
    if config.decay_shape == "linear":
        return start + (config.final - start) * done
    if config.decay_shape == "cosine":
        return config.final + (start - config.final) * (1 + math.cos(math.pi * done)) / 2
    return start / math.sqrt(1 + ((start / config.final) ** 2 - 1) * done)


def constant_rate(config: LearningRateConfig, step: int) -> float:
    """Rate of the constant part at `step`: the last drop that has been reached, else the peak."""
    return next((drop.value for drop in reversed(config.drops) if drop.step <= step), config.peak)
