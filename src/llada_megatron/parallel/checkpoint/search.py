"""Which checkpoints a path means, and the run that made one. Without torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from llada_megatron.llada_moe.config import from_dict, to_dict
from llada_megatron.llada_moe.config.model import ModelConfig, architecture
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.parallel.checkpoint import manifest as checkpoint_manifest

T = TypeVar("T")
TOKENIZER = "tokenizer"
"""Folder of an imported checkpoint's tokenizer files, beside `checkpoints`."""


def find_checkpoints(path: str | Path) -> list[Path]:
    """What `path` can mean, best first: a step directory itself, or the steps of a run, newest first.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / checkpoint_manifest.FILE_NAME).is_file():
        return [path]
    for directory in (path / "checkpoints", path):
        found = [step for _, step in checkpoint_manifest.steps(directory)]
        if found:
            return found
    raise CheckpointError(f"no checkpoint in {path}: give a run's output directory, or one of its step-… directories")


def weights_to_start_from(run: RunConfig) -> Path | None:
    """The step directory that `checkpoint.load` means: itself, or the newest whole one of a run or an import.

    Contents are not verified here, sizes are.

    Raises:
        CheckpointError: there is none, all are damaged, or the newest holds another model.
    """
    if not run.checkpoint.load:
        return None

    def check(path: Path) -> Path:
        manifest = checkpoint_manifest.read(path)
        checkpoint_manifest.verify_sizes(path, manifest)
        require_model(path, manifest.facts, run.model, weights_only=True)
        return path

    return first_whole(find_checkpoints(run.checkpoint.load), check, lambda text: None)


def first_whole(candidates: list[Path], use: Callable[[Path], T], report: Callable[[str], None]) -> T:
    """What `use` makes of the first candidate that it does not find damaged.

    Args:
        report: receives a message for each that was passed over.

    Raises:
        DamagedCheckpointError: of the last candidate.
    """
    for path in candidates[:-1]:
        try:
            return use(path)
        except checkpoint_manifest.DamagedCheckpointError as error:
            report(f"passed over a damaged checkpoint: {error}")
    return use(candidates[-1])


def require_model(path: Path, facts: dict[str, Any], model: ModelConfig, weights_only: bool = False) -> None:
    """Refuse a checkpoint of another model; keys that did not exist when it was written count as their defaults.

    Args:
        weights_only: keys that act in training alone may differ.

    Raises:
        CheckpointError: listing each differing key.
    """
    view = architecture if weights_only else to_dict
    found = from_dict(ModelConfig, facts["model"])
    checkpoint_manifest.require_model(path, {"model": view(found)}, view(model))


def tokenizer_place(step: Path, facts: dict[str, Any]) -> Path | None:
    """Where the tokenizer of a step directory should be; None where its facts name none.

    An import keeps it in a folder beside the checkpoints, also after a move; a training run names the file it used.
    """
    folder = step.parent.parent / TOKENIZER
    if folder.is_dir():
        return folder
    path = (facts.get("tokenizer") or {}).get("path")
    return Path(path) if path else None


def run_of(path: Path) -> RunConfig:
    """The run that made a step directory. Raises CheckpointError."""
    facts = checkpoint_manifest.read(path).facts
    try:
        return from_dict(RunConfig, facts["run"])
    except KeyError as error:
        raise CheckpointError(f"{path}: its manifest does not describe a run ({error})") from error
