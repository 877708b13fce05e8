"""The text of a new run file: every key with its meaning, those that keep their default as comments."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import textwrap
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llada_megatron.launch.layout_choice import Machine
from llada_megatron.llada_moe.config import RunConfig, load_run, to_dict
from llada_megatron.llada_moe.config.documentation import descriptions
from llada_megatron.llada_moe.config.layout import LayoutConfig
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.named import RUNS
from llada_megatron.llada_moe.config.parsing import fields_of
from llada_megatron.llada_moe.objectives import config_class

COLUMNS = 110

SOURCES = (
    "Sources: P8B arXiv 2502.09992 (LLaDA-8B), PMOE arXiv 2509.24389 (LLaDA-MoE), PV2 arXiv 2608.03457 (LLaDA MoE v2), "
    "SMDM arXiv 2410.18514, L2 the LLaDA2.0 report."
)
"""What the meanings of the keys abbreviate."""

_TAKEN_OVER = ("training", "objective", "optimizer", "data", "validation", "recovery")
"""Sections of a shipped run that a new one of the same model begins with."""

_PLAIN: dict[str, Any] = {
    "training": {"steps": 1000, "sequence_length": 1024, "global_batch_size": 64},
    "optimizer": {"learning_rate": {"peak": 4e-4, "warmup_steps": 50, "decay_steps": 200, "final": 1e-5}},
    "data": {"validation_fraction": 0.01},
    "validation": {"interval": 250},
}
"""What a run of a model begins with that has no shipped run. The peak is that of LLaDA-8B; the lengths are ours."""


def start_values(name: str, model: ModelConfig, machine: Machine, layout: LayoutConfig) -> tuple[dict[str, Any], str]:
    """The values that differ from the defaults, as nested mappings, and where they are from."""
    found = _shipped_run(name)
    values = {key: _PLAIN[key] for key in _PLAIN} if found is None else _changed(found)
    training = dict(values["training"]) | {"precision": machine.precision}
    if found is not None:
        shipped = load_run(found).layout
        if _filled_likewise(layout, shipped):
            layout = dataclasses.replace(shipped, data_parallel=layout.data_parallel)
        else:  # what fills a card under one layout may not fit under another
            training |= {"micro_batch_size": 1, "recompute": "full", "recompute_modules": []}
    training["sequence_length"] = min(training["sequence_length"], model.max_sequence_length)
    micro = math.gcd(training.get("micro_batch_size", 1), training["global_batch_size"] // layout.data_parallel or 1)
    step = micro * layout.data_parallel
    training |= {"micro_batch_size": micro, "global_batch_size": -(-training["global_batch_size"] // step) * step}
    values |= {"training": training, "layout": _against(LayoutConfig(), layout)}
    source = "Steps, batch and learning rate are a start and not published: choose your own."
    return values, source if found is None else f"Values are those of configs/runs/{found}.yaml; see its comments."


def _filled_likewise(layout: LayoutConfig, shipped: LayoutConfig) -> bool:
    """Whether a rank holds no more than under the layout of a shipped run: the same parts, and as many to share."""
    plain = dataclasses.replace(shipped, overlap_grad_reduce=False, overlap_param_gather=False)
    alike = dataclasses.replace(plain, data_parallel=layout.data_parallel) == layout
    return alike and layout.data_parallel >= shipped.data_parallel


def render(values: Mapping[str, Any], notes: Sequence[str], schema: str | None) -> str:
    """The text of the file.

    Args:
        values: what the file sets, as nested mappings; `model` may be a name.
        notes: sentences for its head.
        schema: the way to a JSON Schema, for editors.

    Raises:
        ConfigError: the values cannot be a run; names what is wrong.
    """
    head = [f"# yaml-language-server: $schema={schema}"] if schema else []
    head += [line for note in (*notes, SOURCES) for line in _comment(note, "")]
    text = "\n".join([*head, *_section(RunConfig, values, "")]) + "\n"
    with tempfile.TemporaryDirectory(prefix="llada-") as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(text, "utf-8")
        load_run(file)
    return text


def _shipped_run(model: str) -> str | None:
    """The name of the run in configs/runs that trains this model as a diffusion model."""
    for name in RUNS.names():
        content = yaml.safe_load(RUNS.files(name)[0].read_text("utf-8"))
        named = content["model"] if isinstance(content["model"], str) else content["model"].get("base")
        if named == model and (content.get("objective") or {}).get("kind", "diffusion") == "diffusion":
            return name
    return None


def _changed(name: str) -> dict[str, Any]:
    run = load_run(name)
    values = {}
    for section in _TAKEN_OVER:
        found = getattr(run, section)
        values[section] = _against(_with_defaults(type(found)), found)
    values["data"].pop("sets", None)
    return values


def _with_defaults(cls: type) -> dict[str, Any]:
    """The defaults of a dataclass, without the keys that have none."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


def _against(defaults: Any, found: Any) -> dict[str, Any]:
    """The values in which a dataclass differs from its defaults."""
    before = defaults if isinstance(defaults, dict) else to_dict(defaults)
    changed = {}
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if field.name in before and before[field.name] == value:
            continue
        inner = dataclasses.is_dataclass(value)
        changed[field.name] = _against(_with_defaults(type(value)), value) if inner else _plain_value(value)
    return changed


def _plain_value(value: Any) -> Any:
    """Lists of dataclasses as lists of mappings; anything else as it is."""
    if not isinstance(value, list):
        return value
    return [to_dict(item) if dataclasses.is_dataclass(item) else item for item in value]


def _section(cls: type, values: Mapping[str, Any], indent: str) -> Iterator[str]:
    """The lines of a mapping: meaning and value of each key."""
    texts, defaults = descriptions(cls), _with_defaults(cls)
    for name, hint in fields_of(cls).items():
        value = values.get(name)
        if not indent:
            yield ""
        if dataclasses.is_dataclass(hint) and not (name == "model" and cls is RunConfig):
            yield from _nested(hint if name != "objective" else _objective(value), name, value, indent)
            continue
        if name in texts:
            yield from _comment(texts[name], indent)
        choices = typing.get_args(hint)
        section = next(filter(dataclasses.is_dataclass, choices), None) if type(None) in choices else None
        if section is not None:
            yield from _nested(section, name, value, indent)
        elif name in values:
            yield from _entry(name, value, indent)
        elif name in defaults:
            yield from _entry(name, defaults[name], f"{indent}# ")
        elif typing.get_origin(hint) is typing.Literal:  # required, in a section that is left out
            yield from _entry(name, choices[0], f"{indent}# ")


def _nested(cls: type, name: str, value: Mapping[str, Any] | None, indent: str) -> Iterator[str]:
    """A section; where it sets nothing its name is a comment as well, because an empty mapping is none."""
    yield from _comment((cls.__doc__ or "").split("\n\n")[0], indent)
    yield f"{indent}{name}:" if value else f"{indent}# {name}:"
    yield from _section(cls, value or {}, indent + "  ")


def _objective(value: Mapping[str, Any] | None) -> type:
    return config_class((value or {}).get("kind", "diffusion"))


def _entry(name: str, value: Any, indent: str) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield f"{indent}{name}:"
        for key, inner in value.items():
            yield from _entry(key, inner, f"{indent}  ")
    else:
        text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
        yield f"{indent}{name}: {text.removesuffix('...' + chr(10)).strip()}"


def _comment(text: str, indent: str) -> Iterator[str]:
    width = COLUMNS - len(indent)
    for line in textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False):
        yield f"{indent}# {line}"
