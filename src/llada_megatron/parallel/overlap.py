"""Reductions of gradients and gathers of weights that run beside the passes, bucket by bucket.

Megatron starts them from hooks: a gradient that is complete in the last backward pass of a step counts for its bucket,
and a module that is called waits for the bucket of its weights and starts the gather of the next one. What is left for
us: to tell the pipeline schedule which pass is the last, to wait for weights that are read without their module being
called, and to complete all of them before anything else reads them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.utils import get_model_config


def connect(models: list[DistributedDataParallel]) -> None:
    """Let the pipeline schedules and the modules take part in what the models' configuration asks for.

    Megatron's `param_sync_func` stays unset: it would start gathers in validation as well, where weights are whole
    already (`complete_weights`). The weights of an interleaved chunk are gathered when its first module runs.
    """
    settings = models[0].ddp_config
    if settings.overlap_grad_reduce:
        config = get_model_config(models[0])
        no_sync, start = [model.no_sync for model in models], [model.start_grad_sync for model in models]
        config.no_sync_func = no_sync if len(models) > 1 else no_sync[0]
        # stages after the first reduce while the pipeline runs empty
        config.grad_sync_func = start if len(models) > 1 else start[0]
    if settings.overlap_param_gather:
        for model in models:
            for module in model.modules():
                if isinstance(module, SequentialMLP):
                    module.register_forward_pre_hook(partial(_wait_for_all, model))


def complete_weights(models: Iterable[DistributedDataParallel]) -> None:
    """Wait for, or run, the gathers of weights that the last update left open (collective)."""
    for model in models:
        if model.ddp_config.overlap_param_gather:
            model.start_param_sync(force_sync=True)


def _wait_for_all(model: DistributedDataParallel, module: Any, _inputs: Any) -> None:
    """Our experts multiply with the weights of modules that they never call, whose own hooks therefore never run."""
    for parameter in filter(lambda each: each.requires_grad, module.parameters()):
        model.param_to_bucket_group[parameter].finish_param_sync()
