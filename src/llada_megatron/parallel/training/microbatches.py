"""From samples to what the forward passes of a step read: on the host first, then on the device.

`stage` does what can be done on the host, as a function of the samples alone, so that it can be done ahead of the step
(`batches_ahead`). `prepare` does what belongs to the step: the counts of the global batch, and the copy to the device.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace

import torch
from megatron.core import parallel_state

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.data.batch import Batch
from llada_megatron.llada_moe.model.context_slices import Run, held_runs, taken
from llada_megatron.llada_moe.model.head import DraftRows, Targets
from llada_megatron.llada_moe.model.mask_noise import MaskNoise
from llada_megatron.llada_moe.model.patterns import AttentionPattern
from llada_megatron.llada_moe.model.transfer import pinned, to_device
from llada_megatron.llada_moe.objectives import Objective
from llada_megatron.llada_moe.objectives.normalization import TokenCounts, count
from llada_megatron.parallel import device, host_group


@dataclass(frozen=True)
class StagedBatch:
    """A micro-batch on the host, in pinned memory where there is CUDA."""

    batch: Batch
    """The whole sequences."""
    inputs: torch.Tensor
    """`[batch, seq / context_parallel]`: this rank's context slice."""
    targets: Targets | None
    """Of this rank's context slice; None before the last pipeline stage."""
    supervised: torch.Tensor
    """`[batch]` int64: supervised positions in this rank's context slice."""
    counts: TokenCounts
    drafts: DraftRows | None = None
    """Positions of this rank's context slice that the model predicts before the step; None where it predicts none."""


@dataclass
class Microbatch:
    """What one forward pass reads on this rank: its context slice of the sequences, on the device."""

    inputs: torch.Tensor
    """`[batch, seq / context_parallel]`."""
    targets: Targets | None
    """None before the last pipeline stage."""
    boundaries: torch.Tensor
    """Segments of the whole sequences, on the host (see `llada_moe.model.patterns`)."""
    factor: torch.Tensor
    """`[batch]`: normalisation of each sequence (see `llada_moe.objectives.normalization`)."""
    mask_ratio: torch.Tensor
    """`[batch]`."""
    supervised: torch.Tensor
    """`[batch]` int64: supervised positions in this rank's context slice."""
    tokens: torch.Tensor
    """Scalar int32: positions of the slice, by whose sum over micro-batches and ranks Megatron divides gradients."""
    pattern: AttentionPattern
    """Who attends to whom in this step."""
    objective: Objective
    confidence: float = 0.0
    """Factor of the entropies of correct predictions (see `Objective.confidence_factor`)."""
    frozen: dict[str, torch.Tensor] = field(default_factory=dict)
    """By name what each frozen model of the objective makes of these sequences, `[batch]`; on the last stage."""
    noise: MaskNoise | None = None
    """Of the embeddings of masked tokens; None = none at this step, or not the first stage."""
    drafts: DraftRows | None = None
    """Positions of `inputs` that `own_drafts.write_drafts` fills before the step; None where it fills none."""


def local_numbers(run: RunConfig, step: int, data_rank: int) -> list[list[int]]:
    """Numbers of the samples that a data-parallel rank runs in `step`, one list a micro-batch.

    Sample i of the step is number step * global_batch_size + i; micro-batch m of rank r takes the (m * ranks + r)-th
    run of micro_batch_size of them, so that every layout covers the same samples.
    """
    size, ranks = run.training.micro_batch_size, run.layout.data_parallel
    first = step * run.training.global_batch_size
    return [
        list(range(start, start + size))
        for start in range(first + data_rank * size, first + run.training.global_batch_size, ranks * size)
    ]


def stage(
    layout: LayoutConfig, batch: Batch, pattern: AttentionPattern, never: Collection[int] | None = None
) -> StagedBatch:
    """What this rank takes from a batch of a step with `pattern`, ready to be copied to the device.

    `never`: token ids that the model does not predict where it writes drafts; None = it writes none in this step.
    """
    runs = _held_runs(batch.inputs.size(1), pattern)
    inputs, labels, weights = (taken(tensor, runs, dim=1) for tensor in (batch.inputs, batch.labels, batch.weights))
    targets = drafts = None
    slices = layout.tensor_parallel if layout.sequence_parallel else 1
    rank = parallel_state.get_tensor_model_parallel_rank() if slices > 1 else 0
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        targets = Targets.of(labels, weights, rank, slices, _clean(batch, pattern, runs)).pinned()
    if never is not None:
        wanted = torch.zeros(labels.shape, dtype=torch.bool) if batch.drafted is None else taken(batch.drafted, runs, 1)
        drafts = DraftRows.of(wanted, never, rank, slices).pinned()
    return StagedBatch(batch, pinned(inputs.contiguous()), targets, (weights != 0).sum(dim=1), count(batch), drafts)


def _clean(batch: Batch, pattern: AttentionPattern, runs: tuple[Run, ...]) -> torch.Tensor | None:
    """Which positions of this rank's context slice are of the clean half, `[seq]` bool, where that half is learnt from
    too (see `AttentionPattern.causal_clean`)."""
    if not pattern.causal_clean:
        return None
    positions = batch.inputs.size(1)
    return taken(torch.arange(positions) >= positions // 2, runs, dim=0)


def prepare(objective: Objective, staged: list[StagedBatch], step: int) -> list[Microbatch]:
    """Normalise over the global batch of `step`, and copy to the device (collective over the data-parallel ranks)."""
    objective.step = step
    totals = _global_counts(staged)
    where = device.current()
    factors, mask_ratios, supervised = (
        to_device(torch.stack(values), where).unbind()
        for values in (
            [objective.factors(totals, one.batch) for one in staged],
            [one.batch.mask_ratio for one in staged],
            [one.supervised for one in staged],
        )
    )
    confidence = objective.confidence_factor(totals, staged[0].batch)
    tokens = torch.full((), staged[0].inputs.numel(), dtype=torch.int32, device=where)
    return [
        Microbatch(
            inputs=to_device(one.inputs, where),
            targets=None if one.targets is None else replace(one.targets.to(where), confidence=confidence != 0),
            boundaries=one.batch.boundaries,
            factor=factor,
            mask_ratio=mask_ratio,
            supervised=positions,
            tokens=tokens,
            pattern=objective.pattern(step),
            objective=objective,
            confidence=confidence,
            drafts=None if one.drafts is None else one.drafts.to(where),
        )
        for one, factor, mask_ratio, positions in zip(staged, factors, mask_ratios, supervised, strict=True)
    ]


def add_embedding_noise(run: RunConfig, microbatches: list[Microbatch], step: int) -> None:
    """Let the first pipeline stage add noise to the embeddings of masked tokens, if the objective wants it now."""
    std = microbatches[0].objective.embedding_noise(step)
    if std <= 0 or not parallel_state.is_pipeline_first_stage(ignore_virtual=True):
        return
    samples = local_numbers(run, step, parallel_state.get_data_parallel_rank())
    length = microbatches[0].inputs.size(1) * parallel_state.get_context_parallel_world_size()
    runs = _held_runs(length, microbatches[0].pattern)
    for batch, numbers in zip(microbatches, samples, strict=True):
        where = batch.inputs.device
        batch.noise = MaskNoise.of(std, run.training.seed, numbers, run.model.mask_token_id, runs, where)


def _held_runs(positions: int, pattern: AttentionPattern) -> tuple[Run, ...]:
    """What this context rank holds of sequences of so many positions."""
    rank, ranks = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    return held_runs(positions, rank, ranks, pattern)


def _global_counts(staged: list[StagedBatch]) -> TokenCounts:
    """Counts of the whole global batch: this rank's micro-batches summed over data-parallel ranks, on the host."""
    mine = sum((one.counts for one in staged), TokenCounts())
    totals = torch.tensor([getattr(mine, field.name) for field in fields(TokenCounts)], dtype=torch.int64)
    host_group.data_parallel().all_reduce(totals)
    return TokenCounts(*totals.tolist())
