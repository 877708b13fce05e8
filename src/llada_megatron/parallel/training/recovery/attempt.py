"""A step up to its update, run again where it was bad: gradients, figures that all ranks agree on, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from megatron.core.transformer.moe.router import TopKRouter

from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.parallel import device
from llada_megatron.parallel.training.distributed_optimizer import clips_by_tensor
from llada_megatron.parallel.training.recovery.policy import StepFault, find_fault
from llada_megatron.parallel.training.state import RunState
from llada_megatron.parallel.training.step import Losses, Norm, TrainingStep


class RouterStateSnapshot:
    """Routers' expert biases and token counts (Megatron updates them with the gradients), and counters of our own."""

    def __init__(self, models: Iterable[torch.nn.Module], counters: Callable[[], list[torch.Tensor]]) -> None:
        """`counters` returns tensors that hooks of the passes change in place."""
        modules = (module for model in models for module in model.modules())
        self._routers = [module for module in modules if isinstance(module, TopKRouter)]
        self._counters = counters
        self._kept: list[torch.Tensor] = []

    def take(self) -> None:
        """Keep a copy of the present state."""
        self._kept = [tensor.clone() for tensor in self._tensors()]

    def restore(self) -> None:
        """Return to the state that was taken last."""
        for tensor, kept in zip(self._tensors(), self._kept, strict=True):
            tensor.copy_(kept)

    def _tensors(self) -> list[torch.Tensor]:
        return [buffer for router in self._routers for buffer in router.buffers()] + self._counters()


@dataclass(frozen=True)
class StepAttempt:
    """What a step gave. Its gradients are ready; nothing is updated yet."""

    losses: Losses
    loss: float
    """The loss of the global batch, equal on every rank."""
    norm: Norm
    """What the update clips by."""
    grad_norm: float
    """The norm as a number; NaN where it is not finite on some rank."""
    stop: bool
    """Some rank was asked to stop."""
    fault: StepFault | None
    clean_loss: float = 0.0
    """What of `loss` is that of the clean halves of sequences `[x_t ; x_0]`."""
    passed: StepFault | None = None
    """What the first run had and the second, from the same state, has not."""


class StepRunner:
    """Runs steps of one run up to the verdict. All ranks come to the same one."""

    def __init__(self, run: RunConfig, step: TrainingStep, state: RunState, snapshot: RouterStateSnapshot) -> None:
        self._run, self._step, self._state, self._snapshot = run, step, state, snapshot

    def __call__(self, step: int, stop: Callable[[], bool]) -> StepAttempt:
        """Step `step` (from 0); where it stays bad, everything but the gradients is as before (collective).

        Args:
            step: steps done before it.
            stop: whether this rank was asked to stop; called once the gradients are there.
        """
        self._snapshot.take()
        first = self._once(step, stop)
        if first.fault is None:
            return first
        self._snapshot.restore()
        if not self._run.recovery.retry:
            return first
        second = replace(self._once(step, stop), passed=first.fault)
        if second.fault is None:
            return second
        self._snapshot.restore()
        return replace(second, passed=None)

    def _once(self, step: int, stop: Callable[[], bool]) -> StepAttempt:
        losses = self._step.gradients(step)
        norm = self._step.norm()
        loss, clean_loss, grad_norm, stopping = self._agreed(losses, norm, stop())
        fault = find_fault(self._run.recovery, self._state.history, step + 1, loss, grad_norm)
        if not clips_by_tensor():
            norm = grad_norm  # the update would read it once more
        return StepAttempt(losses, loss, norm, grad_norm, stopping, fault, clean_loss)

    def _agreed(self, losses: Losses, norm: Norm, stop: bool) -> tuple[float, float, float, bool]:
        """Loss of the global batch and that of its clean halves, gradient norm (not finite if it is so on any rank),
        stop of any rank.

        One small reduction a step, and one wait for the device. A sum that is reduced comes out equal on all ranks,
        hence so does the verdict.
        """
        here = {"dtype": torch.float64, "device": device.current()}
        # a number is filled in; made into a tensor by a copy, it would be waited for
        measured = norm.to(**here).reshape(()) if torch.is_tensor(norm) else torch.full((), norm, **here)
        stop_requested = torch.full_like(measured, stop)
        shares = [losses.loss.to(measured), losses.clean_loss.to(measured)]
        values = torch.stack([*shares, (~measured.isfinite()).to(measured), stop_requested])
        torch.distributed.all_reduce(values)
        *sums, not_finite, stops, grad_norm = torch.cat([values, measured[None]]).tolist()
        loss, clean = (value / self._run.layout.tensor_parallel for value in sums)  # tensor ranks hold the same rows
        return loss, clean, math.nan if not_finite else grad_norm, stops > 0
