"""The tokenizer's files of an export, and those that an import keeps. Code that comes with a tokenizer is neither run
nor copied.

`AutoTokenizer.from_pretrained(export)` gives the ids that the model was trained on for any text, with
`add_special_tokens=False` where the file has a template, with two reservations. Names of special tokens in running text
are text here: the files written here say so too (`split_special_tokens`), those of an imported folder stay as they are
(give `split_special_tokens=True` in the call). And some SentencePiece models have no equal `tokenizer.json`: see
`sentencepiece_conversion`; then only the `.model` is written.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from llada_megatron.llada_moe.config.schema import ModelConfig
from llada_megatron.llada_moe.data.tokenizer import EOS_NAMES, MASK_NAMES
from llada_megatron.llada_moe.errors import DataError
from llada_megatron.llada_moe.huggingface.sentencepiece_conversion import convert, read_model

FAST, MODEL, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
VOCABULARIES = (FAST, MODEL, "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
"""One of these makes a folder a tokenizer's."""
FILES = (
    *VOCABULARIES,
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass
class TokenizerFiles:
    """What an export has of a tokenizer."""

    files: dict[str, bytes] = field(default_factory=dict)
    """Name and content."""
    notes: list[str] = field(default_factory=list)
    """What the user should know, a sentence each."""


def find_tokenizer_files(directory: Path) -> list[Path]:
    """The files of the tokenizer in a checkpoint's directory; none without a vocabulary."""
    found = [directory / name for name in FILES if (directory / name).is_file()]
    return found if any(path.name in VOCABULARIES for path in found) else []


def code_notes(directory: Path) -> list[str]:
    """A note on the tokenizer's code in a directory, if there is any."""
    names = sorted(path.name for path in directory.glob("tokeniz*.py"))
    return [f"{', '.join(names)} of {directory}: code, neither run nor copied"] if names else []


def tokenizer_files(source: Path | None, model: ModelConfig) -> TokenizerFiles:
    """The files of the tokenizer that a checkpoint was trained with, for an export.

    Args:
        source: a `tokenizer.json`, a SentencePiece `.model`, a folder with the files of a tokenizer, or None.
        model: its token ids become the tokens `eos_token`, `pad_token` (the same) and `mask_token`.

    Files of a folder stay as they are but for what is missing: a mask token, and the names of these three.

    Raises:
        DataError: `source` is no tokenizer, or not that of `model`.
    """
    result = TokenizerFiles()
    if source is None:
        return result
    result.files = _contents(source, result.notes)
    if FAST in result.files:
        _complete(result.files, model, source, result.notes)
    return result


def _contents(source: Path, notes: list[str]) -> dict[str, bytes]:
    """File name -> bytes, before anything is added."""
    if source.name in VOCABULARIES and (source.parent / CONFIG).is_file():
        source = source.parent
    if source.is_dir():
        notes += code_notes(source)
        files = {path.name: path.read_bytes() for path in find_tokenizer_files(source)}
        if not files:
            raise DataError(f"{source}: no file of a tokenizer in this folder (looked for {', '.join(VOCABULARIES)})")
        if FAST not in files:
            notes.append(f"{source} has no {FAST}: its files are copied, and name no mask token")
        return files
    if not source.is_file():
        raise DataError(f"{source}: no such tokenizer file")
    data = source.read_bytes()
    return (
        {FAST: _with_special_names(source, data)} if source.suffix == ".json" else _sentencepiece(source, data, notes)
    )


def _sentencepiece(source: Path, data: bytes, notes: list[str]) -> dict[str, bytes]:
    try:
        parsed = read_model(data)
        if parsed.unlike:
            notes.append(f"{source.name} is exported without a {FAST}, which would not do the same: {parsed.unlike[0]}")
            return {MODEL: data}
        converted = convert(parsed)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    return {FAST: converted.to_str(pretty=True).encode(), MODEL: data}


def _with_special_names(source: Path, data: bytes) -> bytes:
    """The file, with added tokens marked special where HuggingFaceTokenizer takes them for special."""
    content = _parse(source, data)
    for token in content.get("added_tokens") or []:
        token["special"] = token["special"] or token["content"] in (*EOS_NAMES, *MASK_NAMES)
    return data if content == json.loads(data) else _dump(content)


def _complete(files: dict[str, bytes], model: ModelConfig, source: Path, notes: list[str]) -> None:
    """Add what is missing: the mask token, and the names of the special tokens in `tokenizer_config.json`."""
    names = _special_names(files, model, source, notes)
    config = _parse(source, files[CONFIG]) if CONFIG in files else _new_config(model)
    before = dict(config)
    config |= {key: name for key, name in names.items() if not config.get(key)}
    if "auto_map" in config:
        del config["auto_map"]
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        notes.append(f"{CONFIG} named a class in the code that is not copied: {FAST} is read without it")
    if CONFIG not in files or config != before:
        files[CONFIG] = _dump(config)


def _new_config(model: ModelConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.max_sequence_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,
    }


def _special_names(files: dict[str, bytes], model: ModelConfig, source: Path, notes: list[str]) -> dict[str, str]:
    """The names of the model's special tokens; a mask that the file does not have is added to it."""
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
    if model.mask_token_id > size:
        mask = f"the mask's, {model.mask_token_id}, has no name and is stated in config.json alone"
        notes.append(f"{source} ends at id {size - 1}: {mask}")
        return names
    mask = next(name for name in MASK_NAMES if name not in vocabulary)
    content = _parse(source, files[FAST])
    token = {"id": size, "content": mask, "special": True, "normalized": False}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    content["added_tokens"] = [*(content.get("added_tokens") or []), token]
    files[FAST] = _dump(content)
    if _vocabulary(source, files[FAST]).get(mask) != size:
        raise DataError(f"{source}: no token can be added to it at id {size}")
    return names | {"mask_token": mask}


def _vocabulary(source: Path, data: bytes) -> dict[str, int]:
    try:
        return tokenizers.Tokenizer.from_buffer(data).get_vocab(with_added_tokens=True)
    except Exception as error:  # the package raises bare Exception for a file it cannot read
        raise DataError(f"{source}: not a Hugging Face tokenizer ({error})") from error


def _parse(source: Path, data: bytes) -> dict[str, Any]:
    try:
        content = json.loads(data)
    except ValueError as error:
        raise DataError(f"{source}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{source}: not a JSON object")
    return content


def _dump(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
