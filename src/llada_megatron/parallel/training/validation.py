"""Validation under the run's own layout: the bound on the held-out text, in nats per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.data.batch import Batch, Samples
from llada_megatron.llada_moe.evaluation.likelihood import HeldOut, Likelihood
from llada_megatron.llada_moe.objectives import Objective
from llada_megatron.parallel import device, host_group
from llada_megatron.parallel.fp8 import fp8_state
from llada_megatron.parallel.overlap import complete_weights
from llada_megatron.parallel.training.microbatches import prepare, stage
from llada_megatron.parallel.training.step import run_pipeline


def validate(
    run: RunConfig,
    objective: Objective,
    models: list[DistributedDataParallel],
    data: Samples,
    step: int,
    alive: Callable[[], None] = lambda: None,
) -> HeldOut:
    """Cost of the first `validation.sequences` held-out samples, the same windows and masks every time (collective).

    `step`: the one whose attention pattern is used; `alive` is called before every batch.
    """
    objective.step = step
    batches, both = list(_batches(run, data)), objective.pattern(step).causal_clean
    tokens = sum(torch.tensor([int(batch.untruncated.sum()), _next_tokens(batch) if both else 0]) for batch in batches)
    host_group.data_parallel().all_reduce(tokens)
    complete_weights(models)
    for model in models:
        model.eval()
    watch = models[0].register_forward_pre_hook(lambda *_: alive())
    staged = [stage(run.layout, batch, objective.pattern(step)) for batch in batches]
    with fp8_state.unchanged(models):
        losses = run_pipeline(run, models, prepare(objective, staged, step), forward_only=True)
    watch.remove()
    for model in models:
        model.train()
    # the loss stands on the last stage; tensor ranks hold the same rows, context ranks parts of them
    sums = torch.stack([part.double().sum() for part in (losses.weighted, losses.clean)]).to(device.current())
    torch.distributed.all_reduce(sums)
    nats, clean = (value / run.layout.tensor_parallel for value in sums.tolist())
    (whole, predicted), sequences = tokens.tolist(), run.validation.sequences
    if both:
        return HeldOut(clean, predicted, sequences, Likelihood(nats - clean, whole, sequences))
    return HeldOut(nats, whole, sequences)


def _next_tokens(batch: Batch) -> int:
    """Next tokens that the clean halves predict."""
    return int((batch.weights[:, batch.weights.size(1) // 2 :] > 0).sum())


def _batches(run: RunConfig, data: Samples) -> Iterator[Batch]:
    """This data-parallel rank's micro-batches: equally many on every rank, filled up with sequences of no weight."""
    size, ranks, wanted = run.training.micro_batch_size, run.layout.data_parallel, run.validation.sequences
    rounds = math.ceil(wanted / (size * ranks))
    # the interleaved schedule takes whole multiples of the stages
    rounds = math.ceil(rounds / run.layout.pipeline_parallel) * run.layout.pipeline_parallel
    rank = parallel_state.get_data_parallel_rank()
    for start in range(rank * size, rounds * size * ranks, size * ranks):
        numbers = range(start, start + size)
        batch = data.batch([min(number, wanted - 1) for number in numbers])
        surplus = torch.tensor([number >= wanted for number in numbers])
        batch.weights[surplus], batch.untruncated[surplus] = 0.0, 0
        yield batch
