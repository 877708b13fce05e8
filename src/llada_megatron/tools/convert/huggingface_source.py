"""A Hugging Face directory as a source of canonical weights, and the tokenizer's files that an import keeps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llada_megatron.console import message
from llada_megatron.llada_moe.config import validate_model
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.data.tokenizer import Tokenizer
from llada_megatron.llada_moe.data.tokenizer_files import load_tokenizer
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError, DataError
from llada_megatron.llada_moe.huggingface import weights
from llada_megatron.llada_moe.huggingface.formats import export_obstacle, find_format
from llada_megatron.llada_moe.huggingface.formats.table import Format, normalized, read_config
from llada_megatron.llada_moe.huggingface.mapping import Mapping, Part, mappings, merge
from llada_megatron.llada_moe.huggingface.merged_experts import split_experts
from llada_megatron.llada_moe.huggingface.safetensors_reader import TensorDirectory, pickles
from llada_megatron.llada_moe.huggingface.tokenizer_export import code_notes, find_tokenizer_files
from llada_megatron.llada_moe.huggingface.weights import Unit
from llada_megatron.llada_moe.objectives import config_class
from llada_megatron.parallel.checkpoint.manifest import sync_directory, write_durably
from llada_megatron.tools.convert.source import (
    Findings,
    is_padding,
    parameters_by_dtype,
    place_not_finite,
    require_comparable,
)
from llada_megatron.tools.convert.wrapped_names import ADAPTER_CONFIG, adapter_alone, explain


@dataclass(frozen=True)
class KeptTokenizer:
    """The tokenizer in a checkpoint's directory, whose files an import keeps unchanged."""

    files: dict[str, bytes]
    """Name and content; empty if there is no tokenizer."""
    loaded: Tokenizer | None
    """None if there is no tokenizer, or its files cannot be used."""
    notes: list[str]
    """What the user should know, a sentence each."""

    def metadata(self, folder: Path) -> dict[str, Any] | None:
        """What the manifest of a checkpoint says of it, once it is in `folder`."""
        if self.loaded is None:
            return None
        path = folder / self.loaded.path.name
        return {"sha256": self.loaded.sha256, "vocab_size": self.loaded.vocab_size, "path": str(path)}

    def write(self, folder: Path) -> None:
        """Write the files into `folder`, which is made if there are any, and wait until the storage holds them."""
        if self.files:
            folder.mkdir(exist_ok=True)
            for name, data in self.files.items():
                write_durably(folder / name, data)
            sync_directory(folder)


def keep_tokenizer(directory: Path) -> KeptTokenizer:
    """Read the files of the tokenizer in a checkpoint's directory. A message says so if they cannot be used.

    Raises:
        DataError: one is a link that leads out of the directory.
    """
    files = {path.name: path.read_bytes() for path in find_tokenizer_files(directory)}
    try:
        loaded = load_tokenizer(directory) if files else None
    except DataError as error:
        message(f"the tokenizer's files are kept but cannot be used: {error}")
        loaded = None
    notes = code_notes(directory)
    if not files:
        notes.append("no tokenizer files in it: sampling and export will need one (--tokenizer)")
    return KeptTokenizer(files, loaded, notes)


CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
PATTERNS = {"full": "diffusion", "blocks": "diffusion", "causal": "autoregressive", "joint": "joint"}

USABLE_DTYPES = (torch.bfloat16, torch.float32)


class HuggingFaceSource:
    """A directory with `config.json` and safetensors files. Nothing in it is executed."""

    def __init__(self, directory: Path, mask_token_id: int | None = None, require_mask: bool = True) -> None:
        """Read the configuration and the headers of the weights.

        Args:
            mask_token_id: replaces that of the configuration.
            require_mask: refuse a configuration that names no mask token (those of autoregressive models do not) if
                `mask_token_id` is not given.

        Raises:
            CheckpointError: the configuration is missing or of an unknown format, or files are missing or damaged.
            ConfigError: `mask_token_id` is outside the vocabulary, or ends texts.
        """
        self.directory = Path(directory)
        _require_whole_model(self.directory)
        self.config, self.config_sha256 = _read_json(self.directory / CONFIG)
        file = str(self.directory / CONFIG)
        self.format: Format = find_format(self.config, file)
        self._mask_is_missing = mask_token_id is None and self.format.needs_mask(self.config)
        if mask_token_id is not None or (self._mask_is_missing and not require_mask):
            # a placeholder: no token is masked, or the option replaces it below
            self.config["mask_token_id"] = 0 if normalized(self.config).get("eos_token_id") else 1
        self.model: ModelConfig = read_config(self.format, self.config, file)
        if mask_token_id is not None:
            self.model = _with_mask(self.model, mask_token_id)
        self.tensors = TensorDirectory(self.directory)
        self._merged: list[str] = []
        if self.model.moe is not None:
            found = split_experts(self.tensors.tensors, self.model.moe.num_experts)
            self.tensors.tensors, self._merged = found
        shapes = [info.shape for info in self.tensors.tensors.values()]
        require_comparable(self.model, len(shapes), sum(map(math.prod, shapes)), file)
        self.mappings: list[Mapping] = list(mappings(self.format, self.model))
        self._by_unit = {mapping.unit: mapping for mapping in self.mappings}

    @property
    def objective(self) -> ObjectiveConfig:
        """The objective that it says it was trained with (our exports do), or that checkpoints of its format were."""
        kind = "autoregressive" if self.format.autoregressive else "diffusion"
        moe, block = self.model.moe, self.format.block_size
        pattern, length = stated_attention(self.directory)
        if pattern is not None:
            kind, block = PATTERNS[pattern], length
        if moe is not None and moe.expert_capacity > 0:
            block = moe.routing_block_size  # one key of the published configuration says both
        return config_class(kind)(kind=kind, block_size=block)

    @property
    def kind(self) -> str:
        """What kind of checkpoint it is, in words."""
        return f"Hugging Face, {self.format.title}"

    @property
    def tokenizer(self) -> Path | None:
        """The directory, if it has tokenizer files, else None."""
        return self.directory if find_tokenizer_files(self.directory) else None

    def details(self) -> dict[str, Any]:
        """`files` (a number), `bytes`, and `history` (name and value of what is known of its origin)."""
        history = {"mask token": "none; an import needs --mask-token-id"} if self._mask_is_missing else {}
        return {"files": len(self.tensors.files), "bytes": self.tensors.bytes, "history": history}

    def compare(self) -> Findings:
        """Compare its tensors with those that the configuration describes: missing, too many, of another shape."""
        found = dict(self.tensors.tensors)
        result = Findings()
        padded: dict[str, int] = {}
        for mapping in self.mappings:
            for part in mapping.parts:
                if part.start > 0:
                    continue  # a later block of rows of the same tensor
                info = found.pop(part.name, None)
                if info is None:
                    result.missing.append(part.name)
                elif mapping.unit.weight.pattern in weights.VOCABULARY_ROWS and is_padding(part.shape, info.shape):
                    padded[part.name] = info.shape[0] - part.shape[0]
                elif info.shape != part.shape:
                    result.misshapen.append(f"{part.name} (expected {list(part.shape)}, found {list(info.shape)})")
        ends = self.config.get("eos_token_id")
        if isinstance(ends, list) and len(ends) > 1:
            result.notes.append(f"eos_token_id is {ends}: a text ends with {ends[0]} here, the others are not kept")
        for name, rows in padded.items():
            result.notes.append(f"{name}: {rows} rows below the vocabulary of {self.model.vocab_size} are padding")
        ignored = [name for name in found if self.format.ignores(self.config, name)]
        if ignored:
            count = f"{len(ignored)} tensors are" if len(ignored) > 1 else "1 tensor is"
            more = " …" if len(ignored) > 1 else ""
            result.notes.append(f"{count} no part of the model proper ({ignored[0]}{more})")
        result.extra = [name for name in found if name not in ignored]
        self._compare_tied(result)
        result.explanation = explain(result.missing, result.extra)
        if self._merged:
            count = f"{len(self._merged)} tensors hold" if len(self._merged) > 1 else "1 tensor holds"
            result.notes.append(f"{count} the experts of a layer merged ({self._merged[0]} …): each is read by itself")
        if (self.directory / ADAPTER_CONFIG).is_file():
            result.notes.append(
                f"{ADAPTER_CONFIG}: an adapter lies beside the weights; it is not merged into them here"
            )
        obstacle = export_obstacle(self.model)
        if obstacle:
            result.notes.append(f"an export to Hugging Face will be refused: {obstacle}")
        return result

    def require_whole(self) -> list[str]:
        """Return notes on what is ignored. Raises CheckpointError: the tensors are not those of the model."""
        return self.compare().require_none(self.directory, f"the {self.format.title} that its {CONFIG} describes")

    def dtypes(self) -> dict[str, int]:
        """Number of parameters of each dtype, as torch names it."""
        return parameters_by_dtype((info.dtype, info.shape) for info in self.tensors.tensors.values())

    def dtype(self, unit: Unit) -> torch.dtype:
        """The dtype in which the unit is stored."""
        return self.tensors.tensors[self._by_unit[unit].parts[0].name].dtype

    def read(self, unit: Unit, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The tensor of the unit, in `dtype` or as it is stored."""
        parts = [self._read_part(part, dtype) for part in self._by_unit[unit].parts]
        return merge(unit, parts, self.model)

    def _read_part(self, part: Part, dtype: torch.dtype | None) -> torch.Tensor:
        rows = self.tensors.read(part.name, part.start, part.stop)
        return rows if dtype is None else rows.to(dtype)

    def not_finite(self, unit: Unit, dtype: torch.dtype | None = None) -> str | None:
        """Name of the tensor, position and value of the first NaN or infinity of the unit, or None."""
        for part in self._by_unit[unit].parts:
            place = place_not_finite(part.name, self._read_part(part, dtype), part.start)
            if place is not None:
                return place
        return None

    def close(self) -> None:
        """Close the files."""
        self.tensors.close()

    def _compare_tied(self, result: Findings) -> None:
        """Note an output layer that is stored although it is the embedding; if it differs, it is a fault."""
        (embedding,), (output,) = self.format.names[weights.EMBEDDING], self.format.names[weights.OUTPUT]
        if not self.model.tie_embeddings or output not in result.extra:
            return
        result.extra.remove(output)
        if self._same_rows(output, embedding):
            result.notes.append(f"{output} is {embedding} again (the configuration ties them)")
        else:
            result.extra.append(f"{output} (it differs from {embedding}, and the configuration ties them)")

    def _same_rows(self, name: str, embedding: str) -> bool:
        """Whether both tensors have the same rows for every token of the vocabulary."""
        one, other = self.tensors.tensors[name], self.tensors.tensors.get(embedding)
        if other is None or (one.dtype, one.shape[1:]) != (other.dtype, other.shape[1:]):
            return False
        if min(one.rows, other.rows) < self.model.vocab_size:
            return False
        blocks = [(m.unit.start, m.unit.stop) for m in self.mappings if m.unit.weight.pattern == weights.EMBEDDING]
        return all(torch.equal(self.tensors.read(name, *rows), self.tensors.read(embedding, *rows)) for rows in blocks)


def stated_attention(directory: Path) -> tuple[str | None, int | None]:
    """The `attention_pattern` and, of blocks, the `block_length` in the `generation_config.json` of an export.

    Both are None where the file says nothing of them, as published ones do not.
    """
    path = directory / GENERATION_CONFIG
    known = _read_json(path)[0] if path.is_file() else {}
    pattern, length = known.get("attention_pattern"), known.get("block_length")
    if pattern not in PATTERNS:
        return None, None
    if pattern not in ("blocks", "joint"):
        return pattern, None
    if type(length) is not int or length < 1:
        raise CheckpointError(f"{path}: attention_pattern {pattern} needs a block_length, a whole number from 1")
    return pattern, length


def _require_whole_model(directory: Path) -> None:
    """Raises CheckpointError: the directory holds an adapter alone."""
    if (directory / ADAPTER_CONFIG).is_file() and not (directory / CONFIG).is_file():
        raise adapter_alone(directory, _read_json(directory / ADAPTER_CONFIG)[0])


def _with_mask(model: ModelConfig, mask_token_id: int) -> ModelConfig:
    """The model with the mask token of the command line. Raises ConfigError: that token cannot be the mask."""
    model = dataclasses.replace(model, mask_token_id=mask_token_id)
    try:
        validate_model(model)
    except ConfigError as error:
        raise ConfigError(f"--mask-token-id {mask_token_id}: {error}") from None
    return model


def _read_json(path: Path) -> tuple[dict[str, Any], str]:
    """The content of a JSON file, and the SHA-256 of its bytes."""
    try:
        data = path.read_bytes()
        content = json.loads(data)
    except FileNotFoundError:
        if pickles(path.parent):
            TensorDirectory(path.parent).close()  # raises: how to convert them; or else there are weights too
        raise CheckpointError(
            f"{path} is missing: it says what model the weights are; download the whole repository of the checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content, hashlib.sha256(data).hexdigest()
