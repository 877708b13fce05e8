"""When a step counts as bad, and what is done about it: pure functions of the configuration and the run's history.

Steps are numbered from 1, as in metrics.jsonl and in the names of checkpoints. Data, masks and learning rate stay
functions of the step number: a step that is skipped runs no update, and its batch is never used.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Literal

from llada_megatron.llada_moe.config.recovery import SMALLEST_WINDOW, RecoveryConfig

Reason = Literal["not_finite", "spike"]

RETRIES_PER_DECISION = 10
"""Second runs that helped, per decision that recovery.max_decisions allows, before the machine counts as broken."""


@dataclass(frozen=True, kw_only=True)
class StepFault:
    """A bad step, seen before its update: the weights have nothing of it."""

    step: int
    reason: Reason
    loss: float
    grad_norm: float
    deviations: float | None = None
    """For a spike, the standard deviations above the mean of the accepted losses before it."""

    def __str__(self) -> str:
        figures = f"loss {self.loss:.4g}, gradient norm {self.grad_norm:.4g}"
        if self.deviations is None:
            return f"the loss or gradient of step {self.step} is not finite ({figures})"
        return (
            f"the loss of step {self.step} is {self.deviations:.1f} standard deviations above the losses before it "
            f"({figures})"
        )


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What was done about a bad step. Written to recovery.jsonl and to every later checkpoint."""

    number: int
    """From 1, in the order they were taken: what was written down twice counts once."""
    kind: Literal["retry", "skip", "rollback"]
    """retry: a second run from the same state was fine and was used, which changes nothing of the run."""
    step: int
    reason: Reason
    loss: float | None
    """null = not finite; so is `grad_norm`."""
    grad_norm: float | None
    deviations: float | None = None
    back_to: int | None = None
    """For a rollback, the step of the checkpoint."""
    left_out: list[int] = field(default_factory=list)
    """Steps that are skipped from now on: they run no update. (This name stands in files of runs.)"""
    learning_rate_factor: float = 1.0
    """On the learning rates of all steps after `back_to`."""

    @property
    def first_step(self) -> int:
        """The first step that the decision holds for."""
        return self.step if self.back_to is None else self.back_to + 1


@dataclass
class History:
    """What the policy remembers; part of the state of a run."""

    losses: list[float] = field(default_factory=list)
    """Accepted losses, the newest last: never one that is not finite, and never one of a step that was skipped."""
    decisions: list[Decision] = field(default_factory=list)

    @property
    def counted(self) -> int:
        """Decisions that recovery.max_decisions bounds."""
        return sum(decision.kind != "retry" for decision in self.decisions)

    @property
    def retries(self) -> int:
        """Second runs that helped."""
        return len(self.decisions) - self.counted

    def in_force(self, step: int) -> int:
        """How many of the counted decisions hold for `step`."""
        return sum(d.kind != "retry" and d.first_step <= step for d in self.decisions)

    def accept(self, loss: float, window: int) -> None:
        """Take note of the loss of a step that was used."""
        self.losses = [*self.losses, loss][-window:]

    def skips(self, step: int) -> bool:
        """Whether `step` runs no update."""
        return any(step in decision.left_out for decision in self.decisions)

    def rate_factor(self, step: int) -> float:
        """What the learning rate of `step` is multiplied by."""
        factors = (d.learning_rate_factor for d in self.decisions if d.back_to is not None and step > d.back_to)
        return math.prod(factors)

    def learn(self, decisions: list[Decision]) -> None:
        """Add those of `decisions` that are not known yet."""
        known = {decision.number: decision for decision in [*decisions, *self.decisions]}
        self.decisions = [known[number] for number in sorted(known)]

    def add(self, decision: Decision) -> Decision:
        """Add a decision that has just been taken, with the next number; returns it with that."""
        last = self.decisions[-1].number if self.decisions else 0
        self.decisions.append(dataclasses.replace(decision, number=last + 1))
        return self.decisions[-1]


def find_fault(config: RecoveryConfig, history: History, step: int, loss: float, grad_norm: float) -> StepFault | None:
    """What is wrong with `step`, if anything."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        return StepFault(step=step, reason="not_finite", loss=loss, grad_norm=grad_norm)
    above = None if config.spike == "ignore" else deviations(config, history.losses, loss)
    if above is None or above <= config.spike_threshold:
        return None
    return StepFault(step=step, reason="spike", loss=loss, grad_norm=grad_norm, deviations=above)


def deviations(config: RecoveryConfig, losses: list[float], loss: float) -> float | None:
    """Standard deviations that `loss` lies above the mean of the window; None while the window says too little."""
    window = losses[-config.spike_window :]
    if len(window) < max(config.spike_window // 2, SMALLEST_WINDOW):
        return None
    mean = math.fsum(window) / len(window)
    variance = math.fsum((value - mean) ** 2 for value in window) / len(window)
    return (loss - mean) / math.sqrt(variance) if variance > 0 else None


def remedy(config: RecoveryConfig, history: History, fault: StepFault) -> Literal["stop", "skip", "rollback"]:
    """What is to be done about a fault that a second run did not take away."""
    wanted = config.not_finite if fault.reason == "not_finite" else config.spike
    assert wanted != "ignore", "no spike is found where spikes are ignored"
    return "stop" if history.counted >= config.max_decisions else wanted


def broken_machine(config: RecoveryConfig, history: History) -> bool:
    """Whether so many second runs have helped that the next one ends the run."""
    return history.retries >= RETRIES_PER_DECISION * config.max_decisions


def may_go_back(config: RecoveryConfig) -> bool:
    """Whether a run needs a checkpoint to go back to before its first step."""
    return "rollback" in (config.not_finite, config.spike)


def retried(fault: StepFault) -> Decision:
    """The step was run again, and was fine."""
    return _decision("retry", fault)


def skipped(fault: StepFault) -> Decision:
    """The step runs no update."""
    return _decision("skip", fault, left_out=[fault.step])


def rolled_back(config: RecoveryConfig, fault: StepFault, back_to: int) -> Decision:
    """Back to the checkpoint of step `back_to`, without the bad step and those before it, at lower rates."""
    return _decision(
        "rollback",
        fault,
        back_to=back_to,
        left_out=list(range(max(back_to, fault.step - config.skip_steps) + 1, fault.step + 1)),
        learning_rate_factor=config.learning_rate_factor,
    )


def _decision(kind: Literal["retry", "skip", "rollback"], fault: StepFault, **details: object) -> Decision:
    return Decision(
        number=0,  # until it is added to the history
        kind=kind,
        step=fault.step,
        reason=fault.reason,
        loss=_finite(fault.loss),
        grad_norm=_finite(fault.grad_norm),
        deviations=fault.deviations,
        **details,  # type: ignore[arg-type]
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
