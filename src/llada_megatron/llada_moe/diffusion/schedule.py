"""Learning rate as a pure function of the step: nothing to save, nothing to lose when a run resumes."""

from __future__ import annotations

import math

from llada_megatron.llada_moe.config.schema import LearningRateConfig


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
