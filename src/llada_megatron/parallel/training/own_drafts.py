"""The model's own drafts (the multi-turn forward of LLaDA2.1): what it predicts becomes what it has to correct.

Before a step, its micro-batches run forwards once without gradients. At the positions that the samples name, the most
likely tokens are put into the inputs of the step. They are a function of the weights and of the samples: every layout
finds the same, but for ties within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.parallel.fp8 import fp8_state
from llada_megatron.parallel.overlap import complete_weights
from llada_megatron.parallel.training.microbatches import Microbatch


def write_drafts(run: RunConfig, models: list[Any], microbatches: list[Microbatch]) -> None:
    """Put the model's predictions into `inputs` of micro-batches, where `drafts` wants them (collective)."""
    complete_weights(models)
    for model in models:
        model.eval()
    with fp8_state.unchanged(models), torch.no_grad():
        predicted = _predictions(run, models, microbatches)
    for model in models:
        model.train()
    for batch, tokens in zip(microbatches, predicted, strict=False):
        assert batch.drafts is not None
        batch.inputs = batch.drafts.written(batch.inputs, tokens)
    if run.layout.pipeline_parallel > 1:
        _tell_first_stage(microbatches)


def _predictions(run: RunConfig, models: list[Any], microbatches: list[Microbatch]) -> list[torch.Tensor]:
    """Tokens `[positions]` of each micro-batch on the last pipeline stage; none before it."""
    iterators = [iter(microbatches) for _ in models]
    stored = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iterators if len(models) > 1 else iterators[0],
        model=models if len(models) > 1 else models[0],
        num_microbatches=len(microbatches),
        seq_length=microbatches[0].inputs.size(1) * run.layout.context_parallel,
        micro_batch_size=run.training.micro_batch_size,
        forward_only=True,
    )
    return [found["tokens"] for found in stored]


def _forward_step(data: Iterator[Microbatch], model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
    batch = next(data)
    output = model(batch.inputs, batch.boundaries, pattern=batch.pattern, drafts=batch.drafts)

    def without_loss(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        return torch.zeros((), device=tokens.device), batch.tokens, {"tokens": tokens}

    return output, without_loss


def _tell_first_stage(microbatches: list[Microbatch]) -> None:
    """Send the inputs of the last pipeline stage to all; the first one embeds them."""
    inputs = torch.stack([batch.inputs for batch in microbatches])
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast(inputs, last, group=parallel_state.get_pipeline_model_parallel_group())
    for batch, told in zip(microbatches, inputs, strict=True):
        batch.inputs = told
