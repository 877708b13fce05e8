"""What happens when a step goes wrong: the keys of `recovery`, and what cannot help.

Source named below: P8B = arXiv 2502.09992 and the GUIDELINES of ML-GSAI/LLaDA.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RecoveryConfig:
    """What happens when a step goes wrong (a loss or gradient that is not finite, a loss that jumps) or never ends.

    Every decision is in the log, in TensorBoard, in metrics.jsonl and in the checkpoint.
    """

    retry: bool = True
    """Run a bad step once more from the same state: a passing fault of the machine gives another result."""
    not_finite: Literal["stop", "skip", "rollback"] = "stop"
    """A loss or gradient norm that is NaN or infinite: end the run; leave the batch out; or go back to the newest
    whole checkpoint and leave the batch out there."""
    spike: Literal["ignore", "skip", "rollback"] = "ignore"
    """A loss far above those before it."""
    spike_window: int = 128
    """Accepted losses that the mean and the deviation are taken over; half of them must be there first."""
    spike_threshold: float = 6.0
    """Standard deviations above the mean that make a spike."""
    skip_steps: int = 1
    """Batches left out after going back: the one that did it and those before it."""
    learning_rate_factor: float = 1.0
    """Multiplies every learning rate after going back (P8B: 4e-4 to 1e-4, a factor of 0.25)."""
    max_decisions: int = 10
    """Batches left out and times gone back before the run ends instead."""
    hang_factor: float = 10.0
    """A rank hangs when its step takes this many times the median step ..."""
    hang_minimum_s: float = 300.0
    """... and at least so many seconds."""
    hang_other_s: float = 1800.0
    """The limit in seconds for what is not a step: start, validation, saving, loading, and a start's first steps."""


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
