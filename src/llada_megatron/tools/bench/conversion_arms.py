"""The runs that `llada bench ar-to-diffusion` compares, and what their checkpoints cost on held-out text.

All are variations of one run file. The last stages, in which blocks shrink to the size that the model writes with, are
the same in every one of them, so that both bounds at the end are of models that were trained for both.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.llada_moe.config.block_schedule import BlockSchedule, BlockStage, tokens_per_step
from llada_megatron.llada_moe.errors import ConfigError

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.objective import ObjectiveConfig
    from llada_megatron.llada_moe.config.run import RunConfig
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel

SCHEDULE, AT_ONCE = "converted over growing blocks", "converted at once"
SCRATCH, SCRATCH_ALL = "from scratch on the conversion's tokens", "from scratch on all tokens"
FOLDERS = {SCHEDULE: "schedule", AT_ONCE: "at-once", SCRATCH: "scratch", SCRATCH_ALL: "scratch-all"}
ARMS = tuple(FOLDERS)
EXACT, WHOLE, BLOCKS = "next token", "whole window", "last blocks"
"""Figures in bits per byte: the exact cost where next tokens are learnt, the bound of masked diffusion over the whole
window, and the bound in blocks of the size that the run ends with."""


@dataclass(frozen=True)
class CheckpointCost:
    """What a checkpoint costs on the held-out windows."""

    step: int
    bits_per_byte: dict[str, float]


@dataclass(frozen=True)
class TrainedArm:
    """One arm with one seed."""

    points: list[CheckpointCost]
    cpu_seconds: float
    """Of its training, over all processes that trained it (but one that was killed), without these measurements."""

    @property
    def last(self) -> dict[str, float]:
        """The figures of the last checkpoint."""
        return self.points[-1].bits_per_byte

    @property
    def autoregressive_cost(self) -> float:
        """Bits per byte under the last checkpoint that had only learnt next tokens."""
        return [point.bits_per_byte[EXACT] for point in self.points if EXACT in point.bits_per_byte][-1]


def arms_of(base: RunConfig) -> dict[str, RunConfig]:
    """The runs by their name; see `ARMS`. Raises ConfigError for a run without the stages that they differ in."""
    from llada_megatron.llada_moe.objectives.block_diffusion import BlockDiffusionConfig

    objective = base.objective
    schedule = objective.block_schedule if isinstance(objective, BlockDiffusionConfig) else None
    if schedule is None or not schedule.autoregressive_tokens or not schedule.warmup:
        raise ConfigError(
            f"{base.output_dir}: this benchmark needs a run of kind block_diffusion whose objective.block_schedule has "
            "autoregressive_tokens and a warmup, as configs/runs/ar-to-diffusion.yaml has"
        )
    warmup = sum(stage.tokens for stage in schedule.warmup)
    first = schedule.autoregressive_tokens

    def without_warmup(begins_autoregressive: int, more: int) -> BlockSchedule:
        stable = BlockStage(block_size=schedule.stable.block_size, tokens=schedule.stable.tokens + more)
        return replace(schedule, autoregressive_tokens=begins_autoregressive, warmup=[], stable=stable)

    return {
        SCHEDULE: base,
        AT_ONCE: _with(base, without_warmup(first, warmup)),
        SCRATCH: _with(base, without_warmup(0, warmup), mask_embedding_noise=0.0, mask_embedding_noise_steps=0),
        SCRATCH_ALL: _with(
            base, without_warmup(0, warmup + first), mask_embedding_noise=0.0, mask_embedding_noise_steps=0
        ),
    }


def _with(base: RunConfig, schedule: BlockSchedule, **objective: Any) -> RunConfig:
    """The run with other stages, and as many steps as they take."""
    steps = schedule.ends(tokens_per_step(base.training))[-1]
    return replace(
        base,
        training=replace(base.training, steps=steps),
        objective=dataclasses.replace(base.objective, block_schedule=schedule, **objective),  # type: ignore[call-arg]
    )


def trained(run: RunConfig, seed: int, directory: Path, windows: int) -> TrainedArm:
    """Train a run with this seed in `directory` and measure all its checkpoints; or read what was measured before.

    Args:
        windows: how many held-out windows are measured: the same ones, with the same masks, for every arm and seed.

    Raises:
        ConfigError: `directory` holds a run with other settings.
    """
    run = replace(
        run,
        training=replace(run.training, seed=seed),
        checkpoint=replace(run.checkpoint, interval=run.validation.interval, keep_last=run.training.steps),
        validation=replace(run.validation, sequences=run.training.micro_batch_size),  # measured afterwards, all alike
        logging=replace(run.logging, tensorboard=False),
        output_dir=str(directory),
    )
    result, digest = directory / "bounds.json", _digest(run)
    values: dict[str, Any] = {"run": digest, "windows": None, "cpu_seconds": 0.0, "points": []}
    if result.is_file():
        values = json.loads(result.read_text("utf-8"))
        if values.get("run") != digest:
            raise ConfigError(f"{directory}: a run with other settings was trained there; give another --output")
    if values["windows"] == windows:
        return TrainedArm([CheckpointCost(**point) for point in values["points"]], values["cpu_seconds"])
    directory.mkdir(parents=True, exist_ok=True)
    _write(result, values)  # whose checkpoints these will be

    def spent(seconds: float) -> None:
        values["cpu_seconds"] += seconds
        _write(result, values)

    _train(run, spent)
    points = measured(directory / "checkpoints", windows)
    values |= {"windows": windows, "points": [dataclasses.asdict(point) for point in points]}
    _write(result, values)
    return TrainedArm(points, values["cpu_seconds"])


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=1) + "\n", "utf-8")


def _digest(run: RunConfig) -> str:
    """Of all settings of a run but the place of its folder."""
    from llada_megatron.llada_moe.config import to_dict

    settings = json.dumps(to_dict(replace(run, output_dir="")), sort_keys=True, default=str)
    return hashlib.sha256(settings.encode()).hexdigest()


def _train(run: RunConfig, spent: Callable[[float], None]) -> None:
    """Train in this process, or go on; `spent` is told the CPU seconds of this process, also where it is stopped."""
    from llada_megatron.llada_moe.config import validate_run
    from llada_megatron.parallel.training.trainer import Trainer
    from llada_megatron.tools.bench.measurement import single_process

    validate_run(run)
    with single_process(run.training.seed):
        began = time.process_time()
        try:
            Trainer(run).train(lambda: False)
        finally:
            spent(time.process_time() - began)


def measured(checkpoints: Path, windows: int) -> list[CheckpointCost]:
    """The figures of every checkpoint of a run, in the order of their steps."""
    from llada_megatron.parallel.checkpoint.loaded_model import open_checkpoint
    from llada_megatron.parallel.checkpoint.manifest import steps

    found = []
    for step, path in sorted(steps(checkpoints)):
        if step == 0:
            continue
        with open_checkpoint(path) as loaded:
            learnt_masks = not loaded.metadata.get("objective", {}).get("autoregressive")
            names = (WHOLE, BLOCKS) if learnt_masks else (EXACT,)
            found.append(CheckpointCost(step, {name: bits_per_byte(loaded, name, windows) for name in names}))
    return found


def bits_per_byte(loaded: LoadedModel, figure: str, windows: int) -> float:
    """What the first held-out windows cost, of an order and under masks that are those of seed 0 in every run."""
    from llada_megatron.llada_moe.data.training_data import TrainingData
    from llada_megatron.llada_moe.evaluation import likelihood
    from llada_megatron.llada_moe.objectives import make_objective

    training = replace(loaded.run.training, seed=0, global_batch_size=windows)  # strata of t: all windows
    run = replace(loaded.run, training=training, objective=_objective(figure, loaded.run.objective))
    objective = make_objective(run.objective, training)
    loaded.model.use_pattern(objective.pattern(0))
    held_out = TrainingData(run, "validation", objective)
    cost = likelihood.measure(loaded.loss, held_out, range(windows), batch_size=32)
    return cost.bits_per_byte(held_out.bytes_per_token)


def _objective(figure: str, of: ObjectiveConfig) -> ObjectiveConfig:
    """What a figure is the validation of."""
    from llada_megatron.llada_moe.config.objective import ObjectiveConfig
    from llada_megatron.llada_moe.objectives.block_diffusion import BlockDiffusionConfig

    if figure == BLOCKS:
        return BlockDiffusionConfig(kind="block_diffusion", block_size=of.block_size)
    return ObjectiveConfig(kind="diffusion" if figure == WHOLE else "autoregressive")
