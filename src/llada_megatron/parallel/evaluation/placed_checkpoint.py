"""Weights of a loaded model, whose experts were moved or biases changed, as a checkpoint to start from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.parallel import sharded_state
from llada_megatron.parallel.checkpoint.search import TOKENIZER, tokenizer_folder
from llada_megatron.parallel.checkpoint.store import CheckpointStore

if TYPE_CHECKING:
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel


def save_weights(loaded: LoadedModel, folder: Path, changed: dict[str, Any]) -> Path:
    """Write FOLDER/checkpoints/step-…, and the tokenizer beside it; returns the step directory.

    It has no optimizer state: a run starts from it with `checkpoint.load`.

    Args:
        changed: what was done, for the manifest.

    Raises:
        ResourceError: the disk is full.
    """
    store = CheckpointStore(folder / "checkpoints")
    step = int(loaded.metadata["step"])
    metadata = loaded.metadata | {"experts": changed}
    store.save(step, sharded_state.model_state([loaded.model]), metadata)
    store.finish()
    tokenizer = tokenizer_folder(loaded.path)
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder / TOKENIZER, dirs_exist_ok=True)
    return store.directory_of(step)
