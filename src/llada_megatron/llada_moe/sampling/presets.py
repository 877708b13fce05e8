"""Sampling methods by name: published ones with their published settings, and any other choice of the three parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from llada_megatron.llada_moe.config import source
from llada_megatron.llada_moe.config.parsing import closest, fields_of, parse
from llada_megatron.llada_moe.config.schema import ModelConfig, ObjectiveConfig
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.sampling.caches import (
    BlockCausalCache,
    Cache,
    DualCache,
    NoCache,
    PrefixCache,
    Recompute,
)
from llada_megatron.llada_moe.sampling.editors import Editor, NoEditor
from llada_megatron.llada_moe.sampling.loop import Method
from llada_megatron.llada_moe.sampling.schedules import FixedSteps, Schedule, Threshold
from llada_megatron.llada_moe.sampling.statistics import Reading

SCHEDULES: dict[str, type] = {"steps": FixedSteps, "threshold": Threshold}
CACHES: dict[str, type] = {
    "none": NoCache,
    "recompute": Recompute,
    "prefix": PrefixCache,
    "dual": DualCache,
    "block-causal": BlockCausalCache,
}
EDITORS: dict[str, type] = {"none": NoEditor}
_PARTS = {"schedule": SCHEDULES, "cache": CACHES, "editor": EDITORS}


@dataclass(frozen=True)
class Preset:
    """A published method."""

    does: str
    """What it does, in a few words."""
    source: str
    """Where the method and its settings were published."""
    schedule: Schedule
    cache: Cache | None = None
    """None = the exact one of the model: the block-causal cache, or none."""
    editor: Editor = dataclasses.field(default_factory=NoEditor)
    block_length: int | None = None
    """Published length of a block on a bidirectional model; None = one block of all."""
    causal: bool | None = None
    """For block-causal models (True), for bidirectional ones (False), or for both."""


@dataclass(frozen=True)
class Choice:
    """The three parts that fit a model."""

    schedule: Schedule
    cache: Cache
    editor: Editor
    block_length: int | None
    """Of a bidirectional model's blocks, None = one block of all; of a block-causal model its own block size."""
    grid: int | None
    """Block size of a block-causal model; None for a bidirectional one."""

    def method(
        self,
        *,
        excluded: Sequence[int] = (),
        temperature: float = 0.0,
        guidance: float = 0.0,
        seed: int = 0,
        stop_id: int | None = None,
    ) -> Method:
        """The method of a group; see `Reading` and `Method` for the arguments."""
        schedule = self.schedule
        if "seed" in fields_of(type(schedule)):
            schedule = dataclasses.replace(schedule, seed=seed)  # type: ignore[type-var]
        needs = frozenset(schedule.needs) | frozenset(self.editor.needs)
        reading = Reading(needs, tuple(excluded), temperature, guidance, seed)
        return Method(schedule, self.cache, self.editor, reading, stop_id, self.grid)


PRESETS: dict[str, Preset] = {
    "llada": Preset(
        "one token per step, the most confident first (fewer steps: schedule.steps)",
        "LLaDA, arXiv 2502.09992; settings of its generate.py",
        FixedSteps(),
        block_length=32,
    ),
    "fast-dllm": Preset(
        "every token at least 0.9 probable, and the most probable one",
        "Fast-dLLM, arXiv 2505.22618; settings of its scripts",
        Threshold(0.9),
        block_length=32,
    ),
    "fast-dllm-prefix": Preset(
        "the same, with the keys before the block kept from its first step",
        "Fast-dLLM, arXiv 2505.22618; settings of its scripts",
        Threshold(0.9),
        PrefixCache(),
        block_length=32,
        causal=False,
    ),
    "fast-dllm-dual": Preset(
        "the same, with the keys before and behind the block kept from its first step",
        "Fast-dLLM, arXiv 2505.22618; settings of its scripts",
        Threshold(0.9),
        DualCache(),
        block_length=32,
        causal=False,
    ),
}
_DEFAULT = Preset("", "", FixedSteps())


def choose(
    preset: str | None,
    schedule: str | None,
    cache: str | None,
    editor: str | None,
    overrides: Mapping[str, str],
    objective: ObjectiveConfig,
    model: ModelConfig,
    *,
    block_length: int | None = None,
    trained_for_editing: bool = False,
) -> Choice:
    """A preset, with the parts that are named in its place, with single settings changed, fitted to a model.

    Without a preset: fixed steps, no cache (on a block-causal model its exact one), no editor.

    Args:
        preset: a key of `PRESETS`.
        schedule: a key of `SCHEDULES`, instead of the preset's.
        cache: a key of `CACHES`; "none" on a block-causal model recomputes what a block can see.
        editor: a key of `EDITORS`.
        overrides: settings as text, such as {"schedule.threshold": "0.8", "cache.refresh_every": "8"}.
        objective: of the model's training.
        model: the model.
        block_length: instead of the preset's, for a bidirectional model.
        trained_for_editing: the user's word for a model whose configuration does not say so.

    Raises:
        ConfigError: an unknown name or setting, a value of the wrong type or out of range, or a part that does not fit
            the model.
    """
    base = PRESETS[_known("preset", preset, PRESETS)] if preset is not None else _DEFAULT
    grid = objective.block_size
    _fits_kind(preset, base, cache, grid)
    parts: dict[str, Any] = {"schedule": base.schedule, "cache": base.cache, "editor": base.editor}
    for kind, name in (("schedule", schedule), ("cache", cache), ("editor", editor)):
        if name is not None:
            parts[kind] = _PARTS[kind][_known(kind, name, _PARTS[kind])]()
    if parts["cache"] is None:
        parts["cache"] = NoCache() if grid is None else BlockCausalCache()
    elif cache == "none" and grid is not None:
        parts["cache"] = Recompute()
    parts = _overridden(parts, overrides)
    _fits_attention(parts["cache"], grid)
    length = _block_length(block_length, base.block_length, grid)
    return Choice(parts["schedule"], parts["cache"], parts["editor"], length, grid)


def name_of(part: Any) -> str:
    """The name of a schedule, cache or editor."""
    return next(name for kinds in _PARTS.values() for name, kind in kinds.items() if type(part) is kind)


def settings_of(part: Any) -> dict[str, Any]:
    """Its settings that can be overridden."""
    return {name: getattr(part, name) for name in _settable(part)}


def describe() -> list[dict[str, str]]:
    """Every preset: its name, what it does, its settings, the models it is for, its source."""
    return [
        {
            "name": name,
            "does": preset.does,
            "settings": _settings_text(preset),
            "models": {True: "block-causal", False: "bidirectional", None: "all"}[preset.causal],
            "source": preset.source,
        }
        for name, preset in PRESETS.items()
    ]


def table() -> str:
    """The presets as text, for a terminal."""
    lines = []
    for row in describe():
        lines += [f"{row['name']}: {row['does']}"]
        lines += [f"    {row['settings']}", f"    for {row['models']} models; {row['source']}"]
    return "\n".join(lines)


def _settings_text(preset: Preset) -> str:
    parts = [("schedule", preset.schedule), ("cache", preset.cache), ("editor", preset.editor)]
    texts = []
    for kind, part in parts:
        if part is not None and not isinstance(part, NoEditor):
            settings = [f"{key}={value}" for key, value in settings_of(part).items() if value is not None]
            texts.append(" ".join([kind, name_of(part), *settings]))
    if preset.block_length is not None and preset.causal is not True:
        texts.append(f"block length {preset.block_length}")
    return "; ".join(texts)


def _known(kind: str, name: str, names: Iterable[str]) -> str:
    if name not in names:
        raise ConfigError(f"--{kind}: no {kind} {name!r}{closest(name, names)}; there are {', '.join(names)}")
    return name


def _settable(part: Any) -> list[str]:
    return [] if isinstance(part, NoEditor) else [name for name in fields_of(type(part)) if name != "seed"]


def _overridden(parts: dict[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """The parts with settings replaced."""
    nodes: dict[str, list[tuple[yaml.Node, yaml.Node]]] = {kind: [] for kind in parts}
    for key, text in overrides.items():
        kind, _, setting = key.partition(".")
        if kind not in parts:
            raise ConfigError(f"override {key}={text}: settings begin with {', '.join(f'{k}.' for k in parts)}")
        _, node = source.parse_override(f"{key}={text}")
        names = _settable(parts[kind])
        if setting not in names:
            known = f"its settings are {', '.join(names)}" if names else "it has no settings"
            raise ConfigError(
                f"override {key}={text}: the {kind} {name_of(parts[kind])!r} has no setting {setting!r}"
                f"{closest(setting, names)}; {known}"
            )
        nodes[kind].append((yaml.ScalarNode(source.STRING_TAG, setting, node.start_mark, node.end_mark), node))
    return {kind: _with(part, nodes[kind]) for kind, part in parts.items()}


def _with(part: Any, values: list[tuple[yaml.Node, yaml.Node]]) -> Any:
    if not values:
        return part
    parsed, _ = parse(type(part), yaml.MappingNode(source.YAML_TAG + "map", values))
    return dataclasses.replace(part, **{key.value: getattr(parsed, key.value) for key, _ in values})


def _fits_kind(preset: str | None, base: Preset, cache: str | None, grid: int | None) -> None:
    """Whether a preset is for models of this kind of attention; one that only its cache excludes may name another."""
    if base.causal is None or base.causal == (grid is not None) or (base.causal is False and cache is not None):
        return
    others = ", ".join(name for name, other in PRESETS.items() if other.causal in (None, grid is not None))
    if base.causal:
        why = "is for block-causal models, whose blocks see nothing behind them; this model's attention is full"
    else:
        why = f"keeps keys approximately; this model is block-causal (block size {grid}), so its exact cache serves"
    raise ConfigError(f"--preset {preset}: {why}; presets for this model: {others}")


def _fits_attention(cache: Cache, grid: int | None) -> None:
    if cache.causal == (grid is not None):
        return
    fitting = ", ".join(name for name, kind in CACHES.items() if kind.causal == (grid is not None))
    if grid is None:
        why = "is exact for block-causal models only; this model's attention is full: every key depends on all tokens"
    else:
        why = f"is an approximation for bidirectional models; this one is block-causal (block size {grid})"
    raise ConfigError(f"--cache {name_of(cache)}: the cache {why}; use one of {fitting}, or leave --cache out")


def _block_length(wanted: int | None, published: int | None, grid: int | None) -> int | None:
    if wanted is not None and wanted < 1:
        raise ConfigError(f"block length {wanted}: a block has at least one position")
    if grid is None:
        return published if wanted is None else wanted
    if wanted not in (None, grid):
        raise ConfigError(
            f"block length {wanted}: this model was trained with block-causal attention over blocks of {grid} positions"
            " and is sampled with these; leave the block length out"
        )
    return grid
