"""Finding and loading the tokenizer that a checkpoint was trained with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llada_megatron.llada_moe.errors import DataError

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.model import ModelConfig
    from llada_megatron.llada_moe.data.tokenizer import Tokenizer
    from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel


def checkpoint_tokenizer(loaded: LoadedModel, path: str | None = None) -> Tokenizer:
    """The tokenizer that a loaded checkpoint was trained with. Raises DataError as `find_tokenizer` does."""
    return find_tokenizer(loaded.path, loaded.metadata, loaded.run.model, path)


def find_tokenizer(step: Path, metadata: Mapping[str, Any], model: ModelConfig, path: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint, with the end-of-text and mask tokens of the model.

    Args:
        step: the step directory.
        metadata: the metadata of the checkpoint.
        model: the model of the checkpoint.
        path: where the tokenizer is now; None = where it was during training.

    Raises:
        DataError: there is no tokenizer, or it is not the one that the checkpoint was trained with.
    """
    from llada_megatron.llada_moe.data.tokenizer_files import load_tokenizer, require_tokenizer
    from llada_megatron.parallel.checkpoint.search import tokenizer_place

    file = path or tokenizer_place(step, dict(metadata))
    if file is None or not Path(file).exists():
        problem = f"is not at {file}" if file else "is not known (it was imported without one)"
        raise DataError(
            f"the checkpoint's tokenizer {problem}; say where it is with --tokenizer FILE, or give token ids in the "
            "place of texts"
        )
    require_tokenizer(file, metadata.get("tokenizer"), step)
    tokenizer = load_tokenizer(file)
    tokenizer.eos_id, tokenizer.mask_id = model.eos_token_id, model.mask_token_id
    return tokenizer


def ids_without_token(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Ids of a model's vocabulary that its tokenizer has no token for."""
    return [*tokenizer.unused_ids, *range(tokenizer.vocab_size, vocab_size)]
