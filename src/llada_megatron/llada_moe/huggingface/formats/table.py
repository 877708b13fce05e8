"""What the table of a checkpoint format holds, and how a `config.json` is read and written with it.

A format is data: the names of its tensors, the keys of its configuration, and the values of these that our model
supports. To support another format, write its table and list it in `formats/__init__.py`.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llada_megatron.llada_moe.config import from_dict, to_dict, validate_model
from llada_megatron.llada_moe.config.model import ModelConfig, MoEConfig, architecture
from llada_megatron.llada_moe.errors import CheckpointError, ConfigError

REQUIRED = object()
"""Default of a key that must be there, because the architecture is not known without it."""
NO_MASK = object()
"""Default of the mask token in formats of autoregressive models, whose configurations have none."""

Config = dict[str, Any]
"""A parsed `config.json`."""


def is_rotary_buffer(config: Config, name: str) -> bool:
    """Whether a tensor holds rotary frequencies, which old versions of transformers stored with the weights."""
    return name.endswith("rotary_emb.inv_freq")


@dataclass(frozen=True)
class Field:
    """A key of `config.json` and the field of ModelConfig that it fills ("moe." for the MoE part)."""

    key: str | None
    """None = the format has no such key; the field follows from others, by `default`."""
    path: str
    default: Any = REQUIRED
    """For a null key, and for a missing one that `Format.left_out` does not have: a value, or a function of the
    configuration."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """One published checkpoint format."""

    name: str
    title: str
    """Which checkpoints it is, in words."""
    model_type: str
    other_model_types: tuple[str, ...] = ()
    """Further values of `model_type`, of programs that keep the same model in another arrangement."""
    marker: str | None = None
    """A key that distinguishes it from another format with the same `model_type`."""
    names: Mapping[str, tuple[str, ...]]
    """The tensors of each canonical weight, in row order: (query, key, value) or one of all three; (gate, up)."""
    fields: tuple[Field, ...]
    accepted: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys with the values that our model supports; another value is refused."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why another value of such a key is refused."""
    implied: Mapping[str, Any]
    """Fields of ModelConfig that are the same for every model of the format."""
    left_out: Mapping[str, Any] = field(default_factory=dict)
    """What the published configuration class takes for keys that `config.json` leaves out, where a model could be read
    without them."""
    void: Callable[[Config], tuple[str, ...]] = lambda config: ()
    """Keys that have no effect, given the others; they are neither read nor written."""
    ignores: Callable[[Config, str], bool] = is_rotary_buffer
    """Whether the tensor of this name is no part of the model proper, and is skipped."""
    counts: tuple[str, ...] = ()
    """Keys besides `fields` that its functions calculate with: whole numbers, 0 or more."""
    autoregressive: bool = False
    """Whether its models were trained with causal attention on the next token."""
    obstacle: Callable[[ModelConfig], str | None] = lambda model: None
    """Why the published code and our model would compute different things though the keys can hold both, or None."""
    block_size: int | None = None
    """Block size of the block-causal attention that its checkpoints were trained with last; None = full attention."""
    exports: Export | None = None
    """How it is exported; None = it can only be imported."""
    why_not_exported: str = ""

    def needs_mask(self, config: Config) -> bool:
        """Whether neither the configuration nor the format says which token is the mask."""
        unnamed = any(entry.default is NO_MASK for entry in self.fields)
        return unnamed and config.get("mask_token_id") is None


@dataclass(frozen=True, kw_only=True)
class Export:
    """What an exported checkpoint has besides its weights."""

    constants: Mapping[str, Any]
    """Further keys of `config.json`: values, or functions of the ModelConfig."""
    by_threshold: bool = False
    """Whether its published sampler fills masks by a threshold (LLaDA2), not in a fixed number of steps (LLaDA)."""
    folder: str
    """Name of the folder with the modelling files, in `huggingface/modeling`."""


def read_config(table: Format, config: Config, file: str) -> ModelConfig:
    """The architecture that a `config.json` describes.

    Raises:
        CheckpointError: a key is missing or of a wrong type, or asks for something that our model does not support.
    """
    given = normalized(config)
    config = {**table.left_out, **given}
    _require_plain_weights(config, file)
    _require_whole_numbers(table, config, file)
    config = {key: value for key, value in config.items() if key not in table.void(config)}
    for key, values in table.accepted.items():
        found = config.get(key)
        if found is not None and found not in values:
            known = " or ".join(repr(value) for value in values if value is not None)
            reason = f": {table.reasons[key]}" if key in table.reasons else ""
            origin = "" if key in given else ", as the published class takes it to be where it is left out,"
            supported = f"only {known or 'null'} is, in {table.name}"
            raise CheckpointError(f"{file}: {key} = {found!r}{origin} is not supported ({supported}){reason}")
    values: Config = {**table.implied}
    for entry in table.fields:
        values[entry.path] = _value(table, entry, config, file)
    nested: Config = {key: value for key, value in values.items() if not key.startswith("moe.")}
    inner = {key.removeprefix("moe."): value for key, value in values.items() if key.startswith("moe.")}
    nested["moe"] = inner or None
    try:
        model = from_dict(ModelConfig, nested)
        validate_model(model)
    except ConfigError as error:
        raise CheckpointError(f"{file}: it describes no model that can be built: {error}") from error
    if obstacle := table.obstacle(model):
        raise CheckpointError(f"{file}: {obstacle}; weights trained with it would give other logits here")
    return model


def write_config(table: Format, model: ModelConfig) -> Config:
    """The `config.json` of an export, without the keys that depend on the checkpoint.

    Raises:
        CheckpointError: the format cannot hold this architecture; the message names the fields.
    """
    if table.exports is None:
        raise CheckpointError(f"{table.title} is read only: {table.why_not_exported}")
    if obstacle := table.obstacle(model):
        raise CheckpointError(f"the format of {table.title} cannot hold this model: {obstacle}")
    values = to_dict(model)
    values |= {f"moe.{key}": value for key, value in (values["moe"] or {}).items()}
    config: Config = {entry.key: values[entry.path] for entry in table.fields if entry.key}
    config |= {key: value(model) if callable(value) else value for key, value in table.exports.constants.items()}
    config["model_type"] = table.model_type
    config = {key: value for key, value in config.items() if key not in table.void(config)}
    held = architecture(read_config(table, config, "config.json"))
    differing = [
        f"{key} {wanted} (it would be read as {held[key]})"
        for key, wanted in architecture(model).items()
        if held[key] != wanted
    ]
    if differing:
        raise CheckpointError(f"the format of {table.title} cannot hold this model: {'; '.join(differing)}")
    return config


def normalized(config: Config) -> Config:
    """The configuration in one spelling: rotary keys that transformers 5 nests are flat, and one token ends a text."""
    config = dict(config)
    rotary = config.pop("rope_parameters", None)
    if isinstance(rotary, dict):
        flat = {key: rotary[key] for key in ("rope_theta", "partial_rotary_factor") if key in rotary}
        config = {**config, **flat, "rope_scaling": rotary}
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict) and scaling.get("rope_type", scaling.get("type", "default")) == "default":
        config["rope_scaling"] = None
    if "num_local_experts" in config:  # of Qwen3-MoE, as transformers 5 writes it
        config.setdefault("num_experts", config["num_local_experts"])
    ends = config.get("eos_token_id")
    if isinstance(ends, list) and ends:
        config["eos_token_id"] = ends[0]
    return config


def head_dim(config: Config) -> int:
    """Default of `head_dim`: the hidden size divided by the number of heads."""
    return config["hidden_size"] // config["num_attention_heads"]


def _value(table: Format, entry: Field, config: Config, file: str) -> Any:
    value = config.get(entry.key) if entry.key else None
    if value is not None:
        return value
    if entry.default is NO_MASK:
        raise CheckpointError(
            f"{file}: {table.title} names no mask token: give --mask-token-id N, an id that no text has"
        )
    if entry.default is REQUIRED:
        raise CheckpointError(f"{file}: {entry.key!r} is missing; it is not a complete configuration")
    default: Callable[[Config], Any] | Any = entry.default
    try:
        return default(config) if callable(default) else default
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        what = entry.key or entry.path
        raise CheckpointError(f"{file}: {what!r} does not follow from the other keys ({error!r})") from error


def _require_plain_weights(config: Config, file: str) -> None:
    """Raises CheckpointError: the weights are quantised."""
    found = config.get("quantization_config")
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise CheckpointError(
            f"{file}: quantization_config (quant_method {method!r}): quantised weights are not read; take the "
            "checkpoint in bfloat16 or float32 that they were made from"
        )


def _require_whole_numbers(table: Format, config: Config, file: str) -> None:
    """Raises CheckpointError: a key that is used in calculations is not a whole number."""
    types = typing.get_type_hints(ModelConfig)
    types |= {f"moe.{key}": kind for key, kind in typing.get_type_hints(MoEConfig).items()}
    whole = [entry.key for entry in table.fields if entry.key and types[entry.path] is int]
    for key in (*whole, *table.counts):
        value = config.get(key)
        if value is not None and (type(value) is not int or (key in table.counts and value < 0)):
            kind = "a whole number, 0 or more" if key in table.counts else "a whole number"
            raise CheckpointError(f"{file}: {key} = {value!r} is not {kind}")
