"""The special tokens of an exported tokenizer, by the ids of the model and the names in the tokenizer's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.data.tokenizer import MASK_NAMES
from llada_megatron.llada_moe.errors import DataError
from llada_megatron.llada_moe.guard import process

FAST, CONFIG, NAMES = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
GENERIC_CLASS = "PreTrainedTokenizerFast"
"""A class of transformers that does what `tokenizer.json` says and nothing else."""


def complete(files: dict[str, bytes], model: ModelConfig, source: Path, notes: list[str]) -> None:
    """Add what is missing: the mask token, and the names of the special tokens in `tokenizer_config.json`.

    Of names there that stand for another id than the model's, the mask's is replaced; others are kept with a note.
    """
    names = _special_names(files, model, source, notes)
    vocabulary = _vocabulary(source, files[FAST])
    config = parse(beside(source, CONFIG), files[CONFIG]) if CONFIG in files else _new_config(model)
    before = dict(config)
    _correct(config, names, vocabulary, beside(source, CONFIG), notes)
    config |= {key: name for key, name in names.items() if not config.get(key)}
    if CONFIG not in files or config != before:
        files[CONFIG] = dump(config)
    if NAMES in files:  # read instead of tokenizer_config.json if that does not list the added tokens
        table = parse(beside(source, NAMES), files[NAMES])
        before = dict(table)
        _correct(table, names, vocabulary, beside(source, NAMES), notes)
        if table != before:
            files[NAMES] = dump(table)


def parse(path: Path, data: bytes) -> dict[str, Any]:
    """The JSON object in the bytes of a file. Raises DataError, which names the file: they are not one."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: not a JSON object")
    return content


def dump(content: dict[str, Any]) -> bytes:
    """The bytes of a JSON file."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def beside(source: Path, name: str) -> Path:
    """The path of the file `name` of a tokenizer, which `source` gives as a folder or as one of its files."""
    return source / name if source.is_dir() else source if name == FAST else source.with_name(name)


def added_tokens(path: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """The tokens that a `tokenizer.json` adds to its vocabulary. Raises DataError: they are no list of tokens."""
    tokens = content.get("added_tokens") or []
    if not isinstance(tokens, list) or not all(
        isinstance(token, dict) and isinstance(token.get("content"), str) for token in tokens
    ):
        raise DataError(f"{path}: not a Hugging Face tokenizer (added_tokens is no list of tokens with a content each)")
    return tokens


def _new_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": GENERIC_CLASS,
        "model_max_length": model.max_sequence_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }


def _correct(
    table: dict[str, Any], names: dict[str, str], vocabulary: dict[str, int], path: Path, notes: list[str]
) -> None:
    """Replace or remove the name of a wrong mask token in a table of names; note another end-of-text token."""
    mask, end = _content(table.get("mask_token")), _content(table.get("eos_token"))
    if mask and mask != names.get("mask_token"):
        instead = names.get("mask_token")
        table.pop("mask_token")
        if instead:
            table["mask_token"] = instead
        does = f"the export names {instead!r}" if instead else "the export names none"
        notes.append(f"{path} names {mask!r} (id {vocabulary.get(mask)}) as the mask, which is not the model's: {does}")
    if end and end != names["eos_token"]:
        notes.append(
            f"{path} names {end!r} (id {vocabulary.get(end)}) as the end of text, and the model was trained with "
            f"{names['eos_token']!r} (id {vocabulary[names['eos_token']]}): kept as it is; generation_config.json and "
            "config.json have the model's"
        )


def _content(token: Any) -> str | None:
    """The text of a token, which the files give as a string or in a table."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _special_names(files: dict[str, bytes], model: ModelConfig, source: Path, notes: list[str]) -> dict[str, str]:
    """The names of the model's special tokens; a mask token that the file lacks is added to it if that is possible."""
    vocabulary = _vocabulary(source, files[FAST])
    tokens = {index: name for name, index in vocabulary.items()}
    size = max(tokens, default=-1) + 1
    if size > model.vocab_size or model.eos_token_id not in tokens:
        raise DataError(
            f"{source} is not the tokenizer of this model: it has {size} ids, the model {model.vocab_size}, whose "
            f"end-of-text token has id {model.eos_token_id}; name the right one with --tokenizer"
        )
    end = tokens[model.eos_token_id]
    names = {"eos_token": end, "pad_token": end}
    if model.mask_token_id in tokens:
        return names | {"mask_token": tokens[model.mask_token_id]}
    mask = next((name for name in MASK_NAMES if name not in vocabulary), None)
    if mask is not None and model.mask_token_id == size:
        data = _with_token(beside(source, FAST), files[FAST], mask, size)
        if _vocabulary(source, data) == vocabulary | {mask: size}:
            files[FAST] = data
            return names | {"mask_token": mask}
    where = f"ends at id {size - 1}" if model.mask_token_id >= size else "leaves ids out"
    notes.append(f"{source} {where}: the mask's, {model.mask_token_id}, has no name and is stated in config.json alone")
    return names


def _with_token(path: Path, data: bytes, name: str, index: int) -> bytes:
    """A `tokenizer.json` with one more special token."""
    content = parse(path, data)
    token = {"id": index, "content": name, "special": True, "normalized": False}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    content["added_tokens"] = [*added_tokens(path, content), token]
    return dump(content)


def _vocabulary(source: Path, data: bytes) -> dict[str, int]:
    path = str(beside(source, FAST))
    return process.call(path, f"{__name__}:read_vocabulary", path, data.decode("utf-8", "replace"))


def read_vocabulary(path: str, text: str) -> dict[str, int]:
    """All tokens of a `tokenizer.json`, which an error calls `path`; runs in the process with limits."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(text).get_vocab(with_added_tokens=True)
    except Exception as error:  # the package raises bare Exception for a file it cannot read
        raise DataError(f"{path}: not a Hugging Face tokenizer ({error})") from error
