"""Loads of experts that `llada experts` measured: how far the fullest rank of each layer is above the mean."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.errors import ConfigError, DataError

SCHEMA = 1
"""Of the profiles that can be read."""
LARGEST_FILE = 2**28
"""Bytes of a profile; those of 32 layers with 256 experts have some 20 MB."""


@dataclass(frozen=True)
class ExpertLoads:
    """Tokens that each expert of a model received."""

    source: str
    """The file."""
    tokens: tuple[tuple[int, ...], ...]
    """By layer (from the first) and expert; empty for a dense layer."""

    def imbalances(self, ranks: int) -> tuple[float, ...]:
        """By layer: rows of the fullest of `ranks` expert ranks over the mean. A rank holds experts with neighbouring
        numbers."""
        return tuple(fullest_over_mean(layer, ranks) if layer else 1.0 for layer in self.tokens)


def fullest_over_mean(tokens: tuple[int, ...], ranks: int) -> float:
    """Of the rows of `ranks` ranks that hold these experts in their order, equally many each."""
    size = len(tokens) // ranks
    rows = [sum(tokens[first : first + size]) for first in range(0, len(tokens), size)]
    return max(rows) * ranks / sum(rows)


def read_loads(file: str, model: ModelConfig) -> ExpertLoads:
    """The loads in a `profile.json` of `llada experts`, of this model.

    Raises:
        DataError: it cannot be read or is no profile.
        ConfigError: it is of a model with other layers or experts, or the model has none.
    """
    values = _profile(Path(file))
    _refuse_another_model(file, values, model)
    moe = model.moe
    assert moe is not None
    by_layer = {int(number): tuple(layer["tokens"]) for number, layer in values["layers"].items()}
    # the profile counts layers from 1, and has those with experts only
    return ExpertLoads(file, tuple(by_layer.get(layer + 1, ()) for layer in range(model.num_layers)))


def _profile(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise DataError(f"--profile {path}: larger than {LARGEST_FILE // 2**20} MiB, which no profile is")
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"--profile {path}: {error.strerror}; `llada experts --output DIR` writes it") from None
    except (ValueError, RecursionError):
        raise DataError(f"--profile {path}: not JSON; take the profile.json of `llada experts --output DIR`") from None
    fault = _fault(values)
    if fault:
        raise DataError(f"--profile {path}: {fault}; take the profile.json of `llada experts --output DIR`")
    return values


def _fault(values: Any) -> str | None:
    """What a profile must have and this has not; None = it is one."""
    if not isinstance(values, dict) or values.get("schema") != SCHEMA:
        return f"its `schema` is not {SCHEMA}"
    layers = values.get("layers")
    if not isinstance(layers, dict) or not layers or not isinstance(values.get("model"), dict):
        return "it has no `layers` or no `model`"
    for key in ("experts", "top_k"):
        if not _is_count(values.get(key)):
            return f"`{key}` is not a number"
    for number, layer in layers.items():
        tokens = layer.get("tokens") if isinstance(layer, dict) else None
        if not number.isdecimal() or not isinstance(tokens, list) or not all(map(_is_count, tokens)):
            return f"layer {number!r} has no `tokens` of each expert"
        if len(tokens) != values["experts"] or not sum(tokens):
            return f"layer {number} must have the tokens of {values['experts']} experts, not all 0"
    return None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _refuse_another_model(file: str, values: dict[str, Any], model: ModelConfig) -> None:
    moe = model.moe
    if moe is None:
        raise ConfigError(f"--profile {file}: the run's model is dense and has no experts; leave --profile out")
    other = [
        f"{key} {found}, not {own}" for key, found in values["model"].items() if (own := _own(model, key)) != found
    ]
    layers, wanted = sorted(map(int, values["layers"])), list(range(moe.leading_dense_layers + 1, model.num_layers + 1))
    if layers != wanted:
        other.append(f"layers with experts {layers[0]} to {layers[-1]}, not {wanted[0]} to {wanted[-1]}")
    if (values["experts"], values["top_k"]) != (moe.num_experts, moe.top_k):
        other.append(
            f"{values['experts']} experts, {values['top_k']} for each token, not {moe.num_experts}, {moe.top_k}"
        )
    if other:
        raise ConfigError(f"--profile {file}: a profile of another model than the run's: {'; '.join(other)}")


def _own(model: ModelConfig, key: str) -> Any:
    """A value of the model by its path in the configuration, such as `moe.top_k`; None where there is none."""
    found: Any = model
    for part in key.split("."):
        found = getattr(found, part, None)
    return found
