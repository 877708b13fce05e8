"""Which of the open positions are committed in a step: the published rules."""

from llada_megatron.llada_moe.sampling.schedules.base import Running, Schedule, Stateless, best, top
from llada_megatron.llada_moe.sampling.schedules.confidence import (
    CreditThreshold,
    Factor,
    FlooredThreshold,
    Hierarchical,
    Threshold,
)
from llada_megatron.llada_moe.sampling.schedules.entropy import EntropyBound
from llada_megatron.llada_moe.sampling.schedules.slowfast import SlowFast
from llada_megatron.llada_moe.sampling.schedules.stable import Stable
from llada_megatron.llada_moe.sampling.schedules.steps import FixedSteps, RandomSteps

__all__ = [
    "CreditThreshold",
    "EntropyBound",
    "Factor",
    "FixedSteps",
    "FlooredThreshold",
    "Hierarchical",
    "RandomSteps",
    "Running",
    "Schedule",
    "SlowFast",
    "Stable",
    "Stateless",
    "Threshold",
    "best",
    "top",
]
