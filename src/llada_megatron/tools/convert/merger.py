"""`llada merge`: the average of checkpoints, unit by unit: of the best of a run by validation loss, or of all given.

The plain mean of the weights, with which LLaDA2.0's report says that its training ends. It is taken in float64 and
rounded once, so that the mean of equal weights is these weights, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import architecture
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError
from llada_megatron.llada_moe.huggingface.weights import Unit, units
from llada_megatron.llada_moe.objectives import checkpoint_objective
from llada_megatron.tools.convert.best_checkpoints import Candidate, best, candidates
from llada_megatron.tools.convert.derived import Derived, derive
from llada_megatron.tools.convert.sharded_source import ShardedSource
from llada_megatron.tools.convert.source import kept_dtype, require_finite

_MOST_DIFFERENCES = 6


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Options of a merge."""

    best: int | None = None
    """How many checkpoints to average, those with the lowest validation loss; None = all."""
    layout: LayoutConfig
    dtype: torch.dtype | None = None
    """dtype of the written weights; None = as they are stored."""
    workers: int = 1


def merge_checkpoints(paths: Sequence[Path], target: Path, options: MergeOptions) -> dict[str, Any]:
    """Write the average of sharded checkpoints to `target`.

    Args:
        paths: step directories, and directories of runs, which stand for all of their whole checkpoints.

    Returns:
        a summary: the merged checkpoints with their validation losses, number of tensors and parameters, bytes, path of
        the new checkpoint, notes.

    Raises:
        CheckpointError: fewer than two checkpoints are there, validation losses are missing or were measured
            differently, the models differ, or a checkpoint is damaged.
        ConfigError: the dtypes differ and no option decides, the model cannot be cut for the layout, or the target is
            not empty.
        ResourceError: no space is left; the same command continues once there is some.
    """
    found = candidates(paths)
    chosen = found if options.best is None else best(found, options.best)
    if len(chosen) < 2:
        raise CheckpointError(f"{chosen[0].path} is the only checkpoint there: an average takes at least two")
    # in an order of their own, because sums depend on it in the last bit; the newest first, which names the new one
    chosen = sorted(chosen, key=lambda each: (-each.step, str(each.path)))
    sources = [ShardedSource(each.path) for each in chosen]
    _require_alike(sources)
    notes = [note for source in sources for note in source.require_whole()]
    derived = Derived(
        sources=sources,
        model=sources[0].model,
        layout=options.layout,
        dtypes=(dtypes := _dtypes(sources, options.dtype)),
        read=lambda unit: _mean(sources, unit, dtypes[unit]),
        step=chosen[0].step,
        facts={"merged": [_described(each) for each in chosen]},
    )
    plan = {"direction": "merge", "--dtype": str(options.dtype), "--best": options.best}
    summary = derive(target, derived, plan, options.workers, "merging")
    return {"merged": [_described(each) for each in chosen], **summary, "notes": notes}


def _described(each: Candidate) -> dict[str, Any]:
    return {"checkpoint": str(each.path), "step": each.step, "validation_loss": each.loss}


def _require_alike(sources: list[ShardedSource]) -> None:
    """Refuse checkpoints whose average means nothing: other architectures, objectives or tokenizers."""
    for other in sources[1:]:
        what, differing = _difference(sources[0], other)
        if differing:
            rest = f" (and {len(differing) - _MOST_DIFFERENCES} more)" if len(differing) > _MOST_DIFFERENCES else ""
            raise CheckpointError(
                f"{sources[0].directory} and {other.directory} have different {what}: "
                f"{'; '.join(differing[:_MOST_DIFFERENCES])}{rest}; merge checkpoints of one run, or of runs that "
                "began with the same weights"
            )


def _difference(first: ShardedSource, other: ShardedSource) -> tuple[str, list[str]]:
    """In what two checkpoints differ that must not, and how; nothing in the list if they may be merged."""
    a, b = architecture(first.model), architecture(other.model)
    keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    if keys:
        return "architectures", [f"{key}: {a.get(key)} and {b.get(key)}" for key in keys]
    kinds = _kind(first), _kind(other)
    if kinds[0] != kinds[1]:
        return "objectives", [f"{kinds[0]} and {kinds[1]}"]
    digests = [(source.metadata.get("tokenizer") or {}).get("sha256") for source in (first, other)]
    if None in digests or digests[0] == digests[1]:
        return "tokenizers", []
    return "tokenizers", [" and ".join(str(digest)[:12] for digest in digests)]


def _kind(source: ShardedSource) -> str:
    """The kind of the run's objective, so that stages of one schedule of block sizes may be merged; what it was trained
    for, as long as that was no masks."""
    masks = checkpoint_objective(source.run, source.metadata).fills_masks
    return source.run.objective.kind if masks else source.objective.kind


def _dtypes(sources: list[ShardedSource], wanted: torch.dtype | None) -> dict[Unit, torch.dtype]:
    """The dtype to write each unit in."""
    found: dict[Unit, torch.dtype] = {}
    for unit in units(sources[0].model):
        stored = [source.dtype(unit) for source in sources]
        if wanted is None and len(set(stored)) > 1:
            other = next(number for number, dtype in enumerate(stored) if dtype != stored[0])
            raise ConfigError(
                f"{unit.weight.key} is {stored[0]} in {sources[0].directory} and {stored[other]} in "
                f"{sources[other].directory}: give --dtype bf16 or fp32"
            )
        found[unit] = kept_dtype(unit, stored[0], wanted)
    return found


def _mean(sources: list[ShardedSource], unit: Unit, dtype: torch.dtype) -> torch.Tensor:
    """The mean of a unit over the checkpoints, of which one is in memory at a time."""
    total: torch.Tensor | None = None
    for source in sources:
        tensor = source.read(unit)
        require_finite(source, unit, tensor)
        total = tensor.double() if total is None else total.add_(tensor)
    assert total is not None
    return total.div_(len(sources)).to(dtype)
