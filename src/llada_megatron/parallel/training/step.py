"""One training step under any layout: forward and backward of its micro-batches through the pipeline, the update."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config

from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.data.batch import Batch, Samples
from llada_megatron.llada_moe.objectives import Objective, make_objective
from llada_megatron.parallel import device
from llada_megatron.parallel.expert_load import tell_mask_ratio
from llada_megatron.parallel.training.batches_ahead import BatchesAhead
from llada_megatron.parallel.training.distributed_optimizer import clip_gradients, gradient_norm
from llada_megatron.parallel.training.microbatches import (
    Microbatch,
    StagedBatch,
    add_embedding_noise,
    local_numbers,
    prepare,
    stage,
)
from llada_megatron.parallel.training.own_drafts import write_drafts

Norm = float | torch.Tensor
"""Norm of all gradients; newer Megatron versions leave it on the GPU."""


@dataclass
class Losses:
    """Per-sequence sums that the last pipeline stage returns; empty on the other stages. All `[sequences]`."""

    weighted: torch.Tensor
    """sum_i weights_i * cross-entropy_i over this rank's context slice, before normalisation."""
    mask_ratio: torch.Tensor
    supervised: torch.Tensor
    """Supervised positions in this rank's slice."""
    loss: torch.Tensor
    """Scalar: this rank's share of the loss of the global batch; the sum over data and context ranks is the loss."""
    clean: torch.Tensor
    """Of `weighted` what the clean half has, where an objective learns from it; empty elsewhere."""
    clean_loss: torch.Tensor
    """Scalar: of `loss` what the clean half has."""


@dataclass
class StepResult:
    """One finished step."""

    losses: Losses
    grad_norm: float


def _forward_step(data: Iterator[Microbatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
    batch = next(data)
    tell_mask_ratio(model, batch.mask_ratio)
    output = model(batch.inputs, batch.boundaries, targets=batch.targets, pattern=batch.pattern, noise=batch.noise)

    def loss_function(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        clean = sums.chunk(2)[1] if batch.pattern.causal_clean else sums[:0]
        weighted = sums[0] if batch.confidence else sums
        if clean.numel():
            weighted = weighted.chunk(2)[0] + clean
        loss = batch.objective.loss(weighted, batch.factor, batch.frozen)
        if batch.confidence:
            loss = loss + batch.confidence * sums[1].sum()
        facts = {
            "weighted": weighted.detach(),
            "mask_ratio": batch.mask_ratio,
            "supervised": batch.supervised,
            "loss": loss.detach(),
            "clean": clean.detach(),
            "clean_loss": (clean.detach() * batch.factor).sum() if clean.numel() else loss.new_zeros(()),
        }
        return loss, batch.tokens, facts

    return output, loss_function


def run_pipeline(
    run: RunConfig, models: list[torch.nn.Module], microbatches: list[Microbatch], forward_only: bool = False
) -> Losses:
    """Forward (and backward) of all micro-batches through the pipeline; gradients are left in the models' buffers."""
    iterators = [iter(microbatches) for _ in models]
    positions = microbatches[0].inputs.size(1) * run.layout.context_parallel  # of a sequence: twice those of its text
    stored = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iterators if len(models) > 1 else iterators[0],
        model=models if len(models) > 1 else models[0],
        num_microbatches=len(microbatches),
        seq_length=positions,
        micro_batch_size=run.training.micro_batch_size,
        forward_only=forward_only,
    )
    where = device.current()
    total = run.training.global_batch_size * positions

    def join(name: str) -> torch.Tensor:
        return torch.cat([facts[name] for facts in stored]) if stored else torch.zeros(0, device=where)

    def share(name: str) -> torch.Tensor:
        return torch.stack([facts[name] for facts in stored]).sum() / total if stored else torch.zeros((), device=where)

    return Losses(
        join("weighted"), join("mask_ratio"), join("supervised"), share("loss"), join("clean"), share("clean_loss")
    )


def ask_frozen(
    run: RunConfig, models: list[torch.nn.Module], microbatches: list[Microbatch]
) -> tuple[torch.Tensor, ...]:
    """What a frozen model makes of each micro-batch, `[batch]` each: on the last pipeline stage, empty before it."""
    with torch.no_grad():
        losses = run_pipeline(run, models, microbatches, forward_only=True)
    return losses.weighted.split(run.training.micro_batch_size) if losses.weighted.numel() else ()


class TrainingStep:
    """Runs steps of one run on this rank's model chunks."""

    def __init__(
        self,
        run: RunConfig,
        models: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        data: Samples,
        objective: Objective | None = None,
        frozen: dict[str, list[torch.nn.Module]] | None = None,
        ahead: bool = False,
    ) -> None:
        """`data` is a function of the sample numbers where batches are made `ahead` of their step.

        `objective`: None = a new one of the run; `frozen`: the chunks of each of its frozen models by name.
        """
        self.run, self.models, self.optimizer, self.data = run, models, optimizer, data
        self.objective = make_objective(run.objective, run.training) if objective is None else objective
        self.frozen = frozen or {}
        self._device = device.current()
        self._ahead = BatchesAhead(self._stage, run.training.steps) if ahead else None
        config = get_model_config(models[0])
        config.finalize_model_grads_func = finalize_model_grads
        config.grad_scale_func = optimizer.scale_loss

    def batches(self, step: int) -> list[Batch]:
        """This data-parallel rank's micro-batches of `step`."""
        rank = parallel_state.get_data_parallel_rank()
        return [self.data.batch(numbers) for numbers in local_numbers(self.run, step, rank)]

    def _stage(self, step: int) -> list[StagedBatch]:
        device.use(self._device)  # in a thread, where batches are made ahead
        pattern = self.objective.pattern(step)
        never = self.run.model.never_drafted if self.objective.writes_drafts(step) else None
        return [stage(self.run.layout, batch, pattern, never) for batch in self.batches(step)]

    def close(self) -> None:
        """End what runs beside the steps."""
        if self._ahead is not None:
            self._ahead.close()

    def gradients(self, step: int) -> Losses:
        """Forward and backward of `step`; reduced gradients stay in the buffers."""
        for model in self.models:
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        microbatches = prepare(self.objective, (self._ahead or self._stage)(step), step)
        answers = {name: ask_frozen(self.run, models, microbatches) for name, models in self.frozen.items()}
        for number, batch in enumerate(microbatches):
            batch.frozen = {name: found[number] for name, found in answers.items() if found}
        if self.objective.writes_drafts(step):
            write_drafts(self.run, self.models, microbatches)
        add_embedding_noise(self.run, microbatches, step)  # frozen models see the tokens as they are
        return run_pipeline(self.run, self.models, microbatches)

    def norm(self) -> Norm:
        """Norm of the gradients over all ranks; they are then ready for `update`."""
        self.optimizer.prepare_grads()
        return gradient_norm(self.optimizer)

    def update(self, norm: Norm) -> None:
        """Clip the gradients, whose norm is given, and update the weights."""
        clip_gradients(self.optimizer, norm)
        self.optimizer.step_with_ready_grads()

    def __call__(self, step: int) -> StepResult:
        """Forward, backward and update of `step`. The learning rate is the caller's (`optimizer.set_learning_rate`)."""
        losses = self.gradients(step)
        norm = self.norm()
        self.update(norm)
        return StepResult(losses, float(norm))
