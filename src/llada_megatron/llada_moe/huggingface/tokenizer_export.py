"""The tokenizer's files of an export, and those that an import keeps; code beside them is neither run nor copied.

`AutoTokenizer.from_pretrained(export)` gives the ids that the model was trained on for any text; if the file has a
template, with `add_special_tokens=False`. There are two exceptions. In training, names of special tokens within a text
are plain text: files that are written here say so (`split_special_tokens`), but those of an imported folder stay as
they are (give `split_special_tokens=True` in the call). And some SentencePiece models have no equal `tokenizer.json`,
as `sentencepiece_conversion` explains; then only the `.model` is written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.data.tokenizer import EOS_NAMES, MASK_NAMES
from llada_megatron.llada_moe.errors import DataError
from llada_megatron.llada_moe.huggingface.hub_cache import require_own_file
from llada_megatron.llada_moe.huggingface.sentencepiece_conversion import convert, read_model
from llada_megatron.llada_moe.huggingface.tokenizer_names import (
    CONFIG,
    FAST,
    GENERIC_CLASS,
    NAMES,
    added_tokens,
    beside,
    complete,
    dump,
    parse,
)

MODEL = "tokenizer.model"
VOCABULARIES = (FAST, MODEL, "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
"""A folder with one of these files holds a tokenizer."""
FILES = (
    *VOCABULARIES,
    CONFIG,
    NAMES,
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass
class TokenizerFiles:
    """The files of a tokenizer for an export."""

    files: dict[str, bytes] = field(default_factory=dict)
    """Content by name."""
    notes: list[str] = field(default_factory=list)
    """What the user should know, a sentence each."""

    @property
    def loadable(self) -> bool:
        """Whether AutoTokenizer can tell from the files which class reads them."""
        return FAST in self.files or "tokenizer_class" in parse(Path(CONFIG), self.files.get(CONFIG, b"{}"))


def find_tokenizer_files(directory: Path) -> list[Path]:
    """The files of the tokenizer in a checkpoint's directory; none if there is no vocabulary.

    Raises:
        DataError: one is a link that leads out of the directory.
    """
    found = [directory / name for name in FILES if (directory / name).is_file()]
    if not any(path.name in VOCABULARIES for path in found):
        return []
    for path in found:
        require_own_file(path, DataError)
    return found


def code_notes(directory: Path) -> list[str]:
    """Notes on code in a tokenizer's directory, and on code that its configuration names; none if there is none."""
    names = sorted(path.name for path in directory.glob("tokeniz*.py"))
    notes = [f"{', '.join(names)} of {directory}: code, neither run nor copied"] if names else []
    config = next((path for path in find_tokenizer_files(directory) if path.name == CONFIG), None)
    try:
        code = _named_code(parse(config, config.read_bytes())) if config else {}
    except DataError:  # a file that cannot be read names no code, and is refused where it is needed
        code = {}
    for key, value in code.items():
        notes.append(f"{config} names code ({key} {value!r}): not run, and not named in an export")
    return notes


def tokenizer_files(source: Path | None, model: ModelConfig) -> TokenizerFiles:
    """The files of the tokenizer that a checkpoint was trained with, for an export.

    Args:
        source: a `tokenizer.json`, a SentencePiece `.model`, a folder with the files of a tokenizer, or None.
        model: its token ids become the tokens `eos_token`, `pad_token` (the same) and `mask_token`.

    Files of a folder stay as they are, except that what is missing is added (a mask token, and the names of these
    three), a wrong name of the mask token is corrected, and names of code are removed.

    Raises:
        DataError: `source` is no tokenizer, or that of another model.
    """
    result = TokenizerFiles()
    if source is None:
        return result
    if source.name in VOCABULARIES and (source.parent / CONFIG).is_file():
        source = source.parent
    result.files = _contents(source, result.notes)
    if CONFIG in result.files:
        _remove_code(result.files, source)
    if FAST in result.files:
        complete(result.files, model, source, result.notes)
    return result


def _contents(source: Path, notes: list[str]) -> dict[str, bytes]:
    """The files by name as they are, before anything is added or corrected."""
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
    """The file, with those added tokens marked special that HuggingFaceTokenizer treats as special."""
    content = parse(source, data)
    changed = False
    for token in added_tokens(source, content):
        if not token.get("special") and token["content"] in (*EOS_NAMES, *MASK_NAMES):
            token["special"] = changed = True
    return dump(content) if changed else data


def _named_code(config: dict[str, Any]) -> dict[str, Any]:
    """The keys and values of a `tokenizer_config.json` that name code, which transformers would fetch and run."""
    found = {"auto_map": config["auto_map"]} if "auto_map" in config else {}
    name = config.get("tokenizer_class")
    if name is not None and not (isinstance(name, str) and name.isidentifier()):
        found["tokenizer_class"] = name  # a class of a module, or of another repository
    return found


def _remove_code(files: dict[str, bytes], source: Path) -> None:
    """Remove from `tokenizer_config.json` what names code, and the name of the class, which is one of that code."""
    config = parse(beside(source, CONFIG), files[CONFIG])
    if not _named_code(config):
        return
    config.pop("auto_map", None)
    config.pop("tokenizer_class", None)
    if FAST in files:
        config["tokenizer_class"] = GENERIC_CLASS
    files[CONFIG] = dump(config)
