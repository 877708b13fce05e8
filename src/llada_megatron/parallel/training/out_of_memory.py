"""What to say when a GPU's memory runs out: what took it, and which setting would save how much."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

import torch

from llada_megatron.console import size_text
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.errors import ResourceError
from llada_megatron.llada_moe.model.parameters import rank_shares
from llada_megatron.llada_moe.planning.memory import memory_by_stage
from llada_megatron.llada_moe.planning.workload import of_run
from llada_megatron.parallel.build import default_logits_chunk_mb
from llada_megatron.parallel.training.peak import peak_memory_gb

_LEAST_CHUNK_MB = 64
"""Smaller chunks of logits are matrix products of too few rows."""


@contextlib.contextmanager
def explained(
    run: RunConfig, models: Sequence[torch.nn.Module] = (), optimizer: object | None = None
) -> Iterator[None]:
    """Inside the block, torch's error for memory that ran out becomes one line about `run`.

    Args:
        run: what is trained.
        models: its wrapped chunks; none = they are being built.
        optimizer: Megatron's, once there is one.

    Raises:
        ResourceError: in place of torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as failure:
        raise ResourceError(describe(failure, run, models, optimizer)) from failure


def describe(
    failure: torch.OutOfMemoryError,
    run: RunConfig,
    models: Sequence[torch.nn.Module] = (),
    optimizer: object | None = None,
) -> str:
    """One line: what was asked for, the peak by then, what holds how much, and what would save how much."""
    parts = memory_parts(run, models, optimizer)
    largest = max(parts, key=lambda name: parts[name])
    held = ", ".join(f"{name} {size_text(size)}" for name, size in sorted(parts.items(), key=lambda part: -part[1]))
    advice = savings(run)
    remedies = "; ".join(f"{setting} would save about {size_text(saved)}" for setting, saved in advice.items())
    spread = "spread the model over more ranks (layout.expert_parallel, tensor_parallel, pipeline_parallel)"
    if not advice or largest != ACTIVATIONS:
        remedies = f"{remedies}; {spread}" if remedies else spread
    return f"out of memory{_asked(failure)}{_peak()}. Computed: {held}; {largest} take most. {remedies}"


ACTIVATIONS = "activations"
_OF_A_STEP = (ACTIVATIONS, "layer at work", "all-to-all", "logits", "recomputed layer")
"""Parts of the planner's memory that come and go in a step."""


def memory_parts(run: RunConfig, models: Sequence[torch.nn.Module], optimizer: object | None) -> dict[str, float]:
    """Bytes of this rank's parameters, gradients, optimizer and activations.

    The first three are those of the tensors that are there, or of the parameters that this rank is to hold; the
    activations are the planner's estimate (`llada_moe.planning`).
    """
    seen: set[int] = set()
    parameters = [parameter for model in models for parameter in model.parameters()]
    sizes = {
        "parameters": _bytes(parameters, seen),
        "gradients": _bytes((p.main_grad for p in parameters if getattr(p, "main_grad", None) is not None), seen),
        "optimizer": _bytes(_optimizer_tensors(optimizer), seen),
    }
    if not models:
        count = max(share.parameters for share in rank_shares(run.model, run.layout))
        element = 2 if run.training.precision == "bf16" else 4
        sizes = {"parameters": count * element, "gradients": 4.0 * count}
    return {**{name: float(size) for name, size in sizes.items() if size}, ACTIVATIONS: activations(run)}


def savings(run: RunConfig) -> dict[str, float]:
    """Settings that need less memory than those of `run`, and the bytes that each alone would save (an estimate)."""
    training, now, chunk_mb = run.training, activations(run), _chunk_mb(run)
    changes: dict[str, dict[str, object]] = {}
    if training.micro_batch_size > 1:
        half = training.micro_batch_size // 2
        changes[f"training.micro_batch_size={half} (now {training.micro_batch_size})"] = {"micro_batch_size": half}
    if training.recompute != "full":
        changes["training.recompute=full"] = {"recompute": "full", "recompute_modules": []}
    if chunk_mb > _LEAST_CHUNK_MB:
        quarter = max(_LEAST_CHUNK_MB, chunk_mb // 4)
        changes[f"training.logits_chunk_mb={quarter} (now {chunk_mb})"] = {"logits_chunk_mb": quarter}
    saved = {
        setting: now - activations(dataclasses.replace(run, training=dataclasses.replace(training, **keys)))
        for setting, keys in changes.items()
    }
    return dict(sorted(((setting, size) for setting, size in saved.items() if size > 0), key=lambda each: -each[1]))


def activations(run: RunConfig) -> float:
    """Bytes that a rank of the fullest stage holds beside its parameters, gradients and optimizer (the planner's
    estimate): what is kept for the backward pass, and what a layer, an exchange or the loss needs meanwhile."""
    training = dataclasses.replace(run.training, logits_chunk_mb=_chunk_mb(run))
    stages = memory_by_stage(of_run(dataclasses.replace(run, training=training)))
    return max(sum(stage.parts[part] for part in _OF_A_STEP) for stage in stages)


def _chunk_mb(run: RunConfig) -> int:
    return run.training.logits_chunk_mb or default_logits_chunk_mb()


def _bytes(tensors: Iterable[torch.Tensor], seen: set[int]) -> int:
    """Bytes of the storages behind `tensors` that are not in `seen` yet; they are added to it."""
    total = 0
    for tensor in (held for each in tensors for held in _held(each)):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def _held(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that hold a tensor's values. Transformer Engine's FP8 weights have no storage of their own, but FP8
    data and, where the backward pass needs it, a transposed copy; scales are not counted."""
    if not hasattr(tensor, "get_data_tensors"):
        return [tensor]
    return [data for data in tensor.get_data_tensors() if data is not None]


def _optimizer_tensors(optimizer: object | None) -> Iterator[torch.Tensor]:
    """What Adam updates and keeps, of each optimizer that Megatron chains."""
    if optimizer is None:
        return
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        adam = part.optimizer
        if adam is None:
            continue
        yield from (parameter for group in adam.param_groups for parameter in group["params"])
        yield from (value for kept in adam.state.values() for value in kept.values() if torch.is_tensor(value))


def _asked(failure: torch.OutOfMemoryError) -> str:
    found = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(failure))
    return f" when {found[1]} more were asked for" if found else ""


def _peak() -> str:
    if not torch.cuda.is_available():
        return ""
    name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties().total_memory
    return f" on {name} ({size_text(total)}); at most {peak_memory_gb('cuda'):.1f} GB were allocated at a time"
