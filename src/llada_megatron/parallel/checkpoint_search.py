"""Which checkpoints a path means, and the run that made one. Without torch."""

from __future__ import annotations

from pathlib import Path

from llada_megatron.llada_moe.config import from_dict
from llada_megatron.llada_moe.config.schema import RunConfig
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.parallel import checkpoint_manifest


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


def run_of(path: Path) -> RunConfig:
    """The run that made a step directory. Raises CheckpointError."""
    facts = checkpoint_manifest.read(path).facts
    try:
        return from_dict(RunConfig, facts["run"])
    except KeyError as error:
        raise CheckpointError(f"{path}: its manifest does not describe a run ({error})") from error
