"""Which checkpoints a path stands for, and which of them are the best by the validation loss in their manifests."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llada_megatron.console import message
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError
from llada_megatron.parallel.checkpoint import manifest as manifests
from llada_megatron.parallel.checkpoint.search import find_checkpoints

MEASURED_ALIKE = (
    "data.sets",
    "data.validation_fraction",
    "data.isolate_documents",
    "training.sequence_length",
    "training.seed",
    "training.global_batch_size",  # the strata of a batch
    "objective.kind",
    "objective.epsilon",
    "objective.time_per",
    "objective.answers",
    "objective.padding",
    "objective.too_long",
    "objective.pack",
    "validation.sequences",
)
"""Keys of a run that decide which samples and masks its validation loss is measured on."""


@dataclass(frozen=True)
class Candidate:
    """A whole step directory."""

    path: Path
    step: int
    metadata: dict[str, Any]

    @property
    def loss(self) -> float | None:
        """Nats per token of the validation after this very step; None if there was none then."""
        value = (self.metadata.get("validation") or {}).get("nats_per_token")
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def candidates(paths: Sequence[Path]) -> list[Candidate]:
    """The step directories that `paths` name, and all whole ones of the runs that they name.

    Raises:
        CheckpointError: a path names none, or a step directory that is named itself is damaged.
        ConfigError: one is named twice.
    """
    found: dict[Path, Candidate] = {}
    for path in paths:
        named = (path / manifests.FILE_NAME).is_file()
        for step in find_checkpoints(path):
            try:
                candidate = _opened(step)
            except manifests.DamagedCheckpointError as error:
                if named:
                    raise
                message(f"passed over a damaged checkpoint: {error}")
                continue
            if candidate.path in found:
                raise ConfigError(f"{step} is named twice; it counts once in an average")
            found[candidate.path] = candidate
    if not found:
        raise CheckpointError(f"no whole checkpoint in {', '.join(map(str, paths))}")
    return list(found.values())


def _opened(step: Path) -> Candidate:
    manifest = manifests.read(step)
    manifests.verify_sizes(step, manifest)
    if "step" not in manifest.metadata:
        raise manifests.DamagedCheckpointError(f"{step}: its manifest does not say of which step it is")
    return Candidate(step.resolve(), int(manifest.metadata["step"]), manifest.metadata)


def best(found: Sequence[Candidate], count: int) -> list[Candidate]:
    """The `count` with the lowest validation loss, the best first; of equal ones the later.

    Of runs whose block sizes change by stages only the last stage is ranked: the losses of two stages are bounds of
    different models.

    Raises:
        ConfigError: `count` is less than two.
        CheckpointError: fewer have a validation loss, or the losses were not measured alike.
    """
    if count < 2:
        raise ConfigError(f"--best {count}: an average takes at least 2")
    measured = [each for each in found if each.loss is not None]
    if len(measured) < count:
        have = (
            f"{len(measured)} of {len(found)} checkpoints have" if measured else f"none of {len(found)} checkpoints has"
        )
        raise CheckpointError(
            f"--best {count}: {have} a validation loss. A checkpoint has one if validation ran after the same step: "
            "make checkpoint.interval a multiple of validation.interval in the run. Or name the step directories to "
            "average, without --best"
        )
    measured = _of_last_stage(measured, count)
    for other in measured[1:]:
        _require_comparable(measured[0], other)
    return sorted(measured, key=lambda each: (each.loss, -each.step, str(each.path)))[:count]


def _of_last_stage(measured: Sequence[Candidate], count: int) -> list[Candidate]:
    """Those of the stage of `objective.block_schedule` that the latest checkpoint is of; all where there are no stages.

    Raises:
        CheckpointError: fewer than `count` are of that stage.
    """
    if all(_at(each.metadata.get("run", {}), "objective.block_schedule") is None for each in measured):
        return list(measured)
    last = _stage(max(measured, key=lambda each: each.step))
    kept = [each for each in measured if _stage(each) == last]
    if len(kept) < len(measured):
        of = f"{len(kept)} of {len(measured)} measured checkpoints are of the last stage of objective.block_schedule"
        blocks = f"blocks of {_at(last, 'block_size')}"
        if len(kept) < count:
            raise CheckpointError(
                f"--best {count}: {of} ({blocks}), and losses of other stages are of other models. Keep more of them "
                "in the run (checkpoint.interval, keep_last), or name the step directories to average, without --best"
            )
        message(f"{of} ({blocks}); only these are ranked")
    return kept


def _stage(each: Candidate) -> Any:
    """What the objective kept of its stage."""
    return each.metadata.get("objective")


def _require_comparable(first: Candidate, other: Candidate) -> None:
    a, b = _conditions(first), _conditions(other)
    differing = [key for key in a if a[key] != b[key]]
    if differing:
        what = "; ".join(f"{key}: {json.dumps(a[key])} and {json.dumps(b[key])}" for key in differing)
        raise CheckpointError(
            f"--best: the validation losses of {first.path} and {other.path} cannot be compared, because they were "
            f"measured differently ({what}); name the step directories to average, without --best"
        )


def _conditions(each: Candidate) -> dict[str, Any]:
    """How the validation loss was measured: keys of the run, and who attended to whom."""
    run, pattern = each.metadata.get("run", {}), each.metadata["validation"].get("pattern")
    if isinstance(pattern, str):  # what a checkpoint from before that field does not say
        pattern = pattern.replace(", causal_clean=False", "")
    return {key: _at(run, key) for key in MEASURED_ALIKE} | {"attention": pattern}


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values
