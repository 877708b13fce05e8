"""Which checkpoints a path means, which run made one, and where its tokenizer is. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from llada_megatron.llada_moe.config import from_dict, to_dict
from llada_megatron.llada_moe.config.model import ModelConfig, architecture
from llada_megatron.llada_moe.config.run import RunConfig
from llada_megatron.llada_moe.config.trained_parts import LoRAConfig
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError
from llada_megatron.parallel.checkpoint import manifest as manifests

T = TypeVar("T")
TOKENIZER = "tokenizer"
"""Folder of the tokenizer's files that a run or an import carries, beside `checkpoints`, and beside their copies."""


def find_checkpoints(path: str | Path) -> list[Path]:
    """The step directories that `path` can mean, the best first: itself, or those of a run, newest first.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / manifests.FILE_NAME).is_file():
        return [path]
    for directory in (path / "checkpoints", path):
        found = [step for _, step in manifests.steps(directory)]
        if found:
            return found
    if (path / "config.json").is_file() and any(path.glob("*.safetensors*")):
        raise CheckpointError(
            f"{path} is a Hugging Face checkpoint: `llada convert import {path} OUT` comes first, then give OUT"
        )
    raise CheckpointError(f"no checkpoint in {path}: give a run's output directory, or one of its step-… directories")


def weights_to_start_from(run: RunConfig) -> Path | None:
    """The step directory that `checkpoint.load` names, or the newest whole one of the run or import that it names.

    The sizes of files are verified here, their contents are not.

    Raises:
        CheckpointError: there is none, all are damaged, or the newest holds another model.
    """
    if not run.checkpoint.load:
        return None

    def check(path: Path) -> Path:
        manifest = manifests.read(path)
        manifests.verify_sizes(path, manifest)
        require_model(path, manifest.metadata, run.model, weights_only=True)
        return path

    return first_whole(find_checkpoints(run.checkpoint.load), check, lambda text: None)


def first_whole(candidates: list[Path], use: Callable[[Path], T], report: Callable[[str], None]) -> T:
    """The result of `use` for the first candidate that is not damaged.

    Args:
        candidates: step directories, the best first.
        use: reads one; raises DamagedCheckpointError if it is damaged.
        report: receives a message for each that was skipped.

    Raises:
        DamagedCheckpointError: the last candidate is damaged as well.
    """
    for path in candidates[:-1]:
        try:
            return use(path)
        except manifests.DamagedCheckpointError as error:
            report(f"passed over a damaged checkpoint: {error}")
    return use(candidates[-1])


def require_model(path: Path, metadata: dict[str, Any], model: ModelConfig, weights_only: bool = False) -> None:
    """Refuse a checkpoint of another model; keys that did not exist when it was written count as their defaults.

    Args:
        weights_only: keys that matter only in training may differ.

    Raises:
        CheckpointError: listing each differing key.
    """
    view = architecture if weights_only else to_dict
    found = described(ModelConfig, path, metadata, "model")
    manifests.require_model(path, {"model": view(found)}, view(model))


def tokenizer_folder(step: Path) -> Path | None:
    """The folder with the tokenizer that belongs to a step directory of a run, an import or copies, if there is one."""
    step = step.absolute()
    return next((each for each in (step.parent.parent / TOKENIZER, step.parent / TOKENIZER) if each.is_dir()), None)


def tokenizer_place(step: Path, metadata: dict[str, Any]) -> Path | None:
    """Where the tokenizer of a step directory should be; None where its metadata names none.

    A run and an import carry it in a folder beside the checkpoints, which is found even after a move. Where that is
    not there (a step directory that was copied by itself, a run of an earlier version), it is the path in the metadata.
    """
    folder = tokenizer_folder(step)
    path = (metadata.get("tokenizer") or {}).get("path")
    if folder is None:
        return Path(path) if path else None
    if "imported" in metadata:
        return folder
    # of a run the file: what is missing beside it may be added, while a folder is taken as it is
    return next((file for file in (folder / "tokenizer.json", folder / "tokenizer.model") if file.is_file()), folder)


def run_of(path: Path) -> RunConfig:
    """The configuration of the run that made a step directory. Raises CheckpointError: its manifest holds none."""
    return described(RunConfig, path, manifests.read(path).metadata, "run")


def factors_of(path: Path, metadata: Mapping[str, Any]) -> LoRAConfig | None:
    """The low-rank factors that a step directory holds beside the weights; None = there are none.

    Raises:
        DamagedCheckpointError: its manifest does not describe them.
    """
    training = metadata.get("run", {}).get("training", {})
    return described(LoRAConfig, path, training, "lora") if training.get("lora") is not None else None


def without_factors(metadata: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a step directory, as if its factors had never been apart from the weights."""
    run = metadata["run"]
    return metadata | {"run": run | {"training": run["training"] | {"lora": None}}}


def described(cls: type[T], path: Path, metadata: Mapping[str, Any], key: str) -> T:
    """The configuration of class `cls` that stands under `key` in the metadata of a step directory.

    Raises:
        DamagedCheckpointError: there is none, or it does not hold the keys and values of one.
    """
    try:
        return from_dict(cls, metadata[key])
    except (ConfigError, KeyError, RecursionError) as error:
        raise manifests.DamagedCheckpointError(f"{path}: its manifest does not describe a {key} ({error})") from error
