"""Schedules: published rules that choose which open positions are committed in a step."""

from llada_megatron.llada_moe.sampling.schedules.schedule import RunningSchedule, Schedule, Stateless, best, top
from llada_megatron.llada_moe.sampling.schedules.self_speculation import SelfSpeculation
from llada_megatron.llada_moe.sampling.schedules.stateful import SlowFast, Stable
from llada_megatron.llada_moe.sampling.schedules.stateless import (
    CreditThreshold,
    EntropyBound,
    Factor,
    FixedSteps,
    FlooredThreshold,
    Hierarchical,
    RandomSteps,
    Threshold,
)

__all__ = [
    "CreditThreshold",
    "EntropyBound",
    "Factor",
    "FixedSteps",
    "FlooredThreshold",
    "Hierarchical",
    "RandomSteps",
    "RunningSchedule",
    "Schedule",
    "SelfSpeculation",
    "SlowFast",
    "Stable",
    "Stateless",
    "Threshold",
    "best",
    "top",
]
