"""What is saved, measured and reported every so many steps: `checkpoint`, `validation` and `logging`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llada_megatron.llada_moe.config.parsing import Refuse, require_positive


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When state is written and what is kept."""

    interval: int = 1000
    keep_last: int = 3
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this stay for ever; 0 = none do."""
    copy_to: str | None = None
    """A second folder, on other storage, that every checkpoint is copied to in the background; a run resumes from
    either. A folder of its own for each run."""
    max_failures: int = 3
    """A save that fails is reported and tried again at the next interval; so many in a row end the run."""
    asynchronous: bool = False
    """Write in the background where the installed versions do that safely; otherwise a message says why not."""
    load: str | None = None
    """Start from these weights: a step directory, or a run or an import, whose newest whole checkpoint counts (a run
    that resumes its own checkpoints ignores it)."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Bits per byte on the held-out documents; 0 steps = never."""

    interval: int = 0
    sequences: int = 64


@dataclass(frozen=True, kw_only=True)
class LoggingConfig:
    """What is reported, every `interval` steps."""

    interval: int = 10
    tensorboard: bool = True
    callbacks: list[str] = field(default_factory=list)
    """Other places for the metrics: wandb, mlflow (each an extra to install), or module:Class, a subclass of
    `llada_megatron.parallel.training.callbacks.MetricsCallback`, which runs in the process of rank 0."""


def check_reporting(
    checkpoint: CheckpointConfig,
    validation: ValidationConfig,
    logging: LoggingConfig,
    output_dir: str,
    refuse: Refuse,
) -> None:
    """Intervals and the folder that results go to."""
    at_least_one = {
        "checkpoint.interval": checkpoint.interval,
        "checkpoint.keep_last": checkpoint.keep_last,
        "checkpoint.max_failures": checkpoint.max_failures,
        "logging.interval": logging.interval,
        "validation.sequences": validation.sequences,
    }
    require_positive(at_least_one, refuse)
    if validation.interval < 0:
        refuse("validation.interval", f"{validation.interval} must not be negative; 0 means never")
    for number, name in enumerate(logging.callbacks):
        if name in logging.callbacks[:number]:
            refuse(f"logging.callbacks.{number}", f"{name!r} is named twice; remove one")
    if not output_dir:
        refuse("output_dir", "empty; name the folder for checkpoints, metrics and logs")
    _check_checkpoint(checkpoint, output_dir, refuse)


def _check_checkpoint(checkpoint: CheckpointConfig, output_dir: str, refuse: Refuse) -> None:
    if checkpoint.keep_every < 0:
        refuse("checkpoint.keep_every", f"{checkpoint.keep_every} must not be negative; 0 keeps none for ever")
    elif checkpoint.interval > 0 and checkpoint.keep_every % checkpoint.interval:
        refuse(
            "checkpoint.keep_every",
            f"{checkpoint.keep_every} is not a multiple of checkpoint.interval {checkpoint.interval}, so most of these "
            "steps would not be saved",
        )
    if checkpoint.copy_to is None:
        return
    own = [Path(output_dir).absolute(), Path(output_dir).absolute() / "checkpoints"]
    if not checkpoint.copy_to or Path(checkpoint.copy_to).absolute() in own:
        refuse("checkpoint.copy_to", f"{checkpoint.copy_to!r} must name another folder than output_dir; null = none")
