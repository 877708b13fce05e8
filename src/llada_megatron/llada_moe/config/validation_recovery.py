"""A recovery policy that can help: windows with a deviation, going back that changes something, times that pass."""

from __future__ import annotations

from collections.abc import Callable

from llada_megatron.llada_moe.config.schema import RecoveryConfig

SMALLEST_WINDOW = 8
"""Losses below which a standard deviation says little."""


def check_recovery(recovery: RecoveryConfig, refuse: Callable[[str, str], None]) -> None:
    """Numbers of the policy, and of the watch over ranks that hang."""
    if recovery.spike_window < SMALLEST_WINDOW:
        refuse(
            "spike_window", f"{recovery.spike_window} losses have no steady deviation; use {SMALLEST_WINDOW} or more"
        )
    for key in ("spike_threshold", "max_decisions", "hang_minimum_s", "hang_other_s"):
        if getattr(recovery, key) <= 0:
            refuse(key, f"{getattr(recovery, key)} must be greater than 0")
    if not 0 < recovery.learning_rate_factor <= 1:
        refuse("learning_rate_factor", f"{recovery.learning_rate_factor} must be greater than 0 and at most 1")
    if recovery.hang_factor <= 1:
        refuse("hang_factor", f"{recovery.hang_factor} must be greater than 1; every second step is above the median")
    goes_back = "rollback" in (recovery.not_finite, recovery.spike)
    if recovery.skip_steps < 0:
        refuse("skip_steps", f"{recovery.skip_steps} must not be negative")
    elif goes_back and recovery.skip_steps == 0 and recovery.learning_rate_factor == 1:
        refuse(
            "skip_steps",
            "0 with learning_rate_factor 1 goes back and then runs the same steps again; leave a batch out, or lower "
            "the rate",
        )
