"""A step up to its update: gradients, figures that all ranks agree on, the verdict, and a second run of a bad one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from llada_megatron.llada_moe.config.schema import RunConfig
from llada_megatron.parallel import device
from llada_megatron.parallel.recovery.policy import Fault, find_fault
from llada_megatron.parallel.recovery.undo import Undo
from llada_megatron.parallel.state import RunState
from llada_megatron.parallel.step import Losses, Norm, TrainingStep


@dataclass(frozen=True)
class Attempt:
    """What a step gave. Its gradients are ready; nothing is updated yet."""

    losses: Losses
    loss: float
    """Of the global batch, the same on every rank."""
    norm: Norm
    """What the update clips by."""
    grad_norm: float
    """The same as a number; NaN where it is not finite on some rank."""
    stop: bool
    """Some rank was asked to stop."""
    fault: Fault | None
    passed: Fault | None = None
    """What the first run had and the second, from the same state, has not."""


class Attempts:
    """Runs steps of one run up to the verdict. All ranks come to the same one."""

    def __init__(self, run: RunConfig, step: TrainingStep, state: RunState, undo: Undo) -> None:
        self._run, self._step, self._state, self._undo = run, step, state, undo

    def __call__(self, step: int, stop: Callable[[], bool]) -> Attempt:
        """Step `step` (from 0); where it stays bad, everything but the gradients is as before (collective).

        Args:
            step: steps done before it.
            stop: whether this rank was asked to stop; looked at once the gradients are there.
        """
        self._undo.remember()
        first = self._once(step, stop)
        if first.fault is None:
            return first
        self._undo.take_back()
        if not self._run.recovery.retry:
            return first
        second = replace(self._once(step, stop), passed=first.fault)
        if second.fault is None:
            return second
        self._undo.take_back()
        return replace(second, passed=None)

    def _once(self, step: int, stop: Callable[[], bool]) -> Attempt:
        losses = self._step.gradients(step)
        norm = self._step.norm()
        loss, grad_norm, stopping = self._agreed(losses, norm, stop())
        fault = find_fault(self._run.recovery, self._state.history, step + 1, loss, grad_norm)
        return Attempt(losses, loss, norm, grad_norm, stopping, fault)

    def _agreed(self, losses: Losses, norm: Norm, stop: bool) -> tuple[float, float, bool]:
        """Loss of the global batch, gradient norm (not finite if it is so on any rank), stop of any rank.

        One small reduction a step, and one wait for the device. A sum that is reduced comes out equal on all ranks,
        hence so does the verdict.
        """
        measured = torch.as_tensor(norm, dtype=torch.float64, device=device.current()).reshape(())
        asked = torch.full_like(measured, stop)
        values = torch.stack([losses.loss.to(measured), (~measured.isfinite()).to(measured), asked])
        torch.distributed.all_reduce(values)
        loss, not_finite, stops, grad_norm = torch.cat([values, measured[None]]).tolist()
        # tensor ranks hold the loss of the same rows
        return loss / self._run.layout.tensor_parallel, math.nan if not_finite else grad_norm, stops > 0
