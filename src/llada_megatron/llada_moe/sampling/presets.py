"""Choosing a sampling method for a model: a published method by its name, or any combination of the three parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from llada_megatron.llada_moe.config import yaml_nodes
from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.config.parsing import closest, fields_of, parse
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.objectives import make_objective
from llada_megatron.llada_moe.sampling.caches import BlockCausalCache, Cache, NoCache, Recompute
from llada_megatron.llada_moe.sampling.editors import Editor, Levenshtein, NoEditor, TokenEditing
from llada_megatron.llada_moe.sampling.editors import trained_for_editing as learnt_editing
from llada_megatron.llada_moe.sampling.loop import Method
from llada_megatron.llada_moe.sampling.published import (
    CACHES,
    EDITORS,
    PARTS,
    PRESETS,
    SCHEDULES,
    Preset,
    describe,
    in_words,
    name_of,
    settings_of,
    table,
)
from llada_megatron.llada_moe.sampling.schedules import FixedSteps, Schedule, SelfSpeculation
from llada_megatron.llada_moe.sampling.statistics import LogitsProcessor

__all__ = ["CACHES", "EDITORS", "PRESETS", "SCHEDULES", "Choice", "Preset", "choose", "describe", "table"]

_DEFAULT = Preset("", "", FixedSteps())


@dataclass(frozen=True)
class Choice:
    """The three parts of a method, fitted to a model."""

    schedule: Schedule
    cache: Cache
    editor: Editor
    block_length: int | None
    """Positions of a block. For a bidirectional model None means one single block; a block-causal model has its own."""
    grid: int | None
    """Block size of a block-causal model; None for a bidirectional one, and where a text has no blocks."""
    causal_text: bool = False
    """As in `Method`."""

    def __str__(self) -> str:
        """The parts and their settings in one line."""
        return in_words(self.schedule, self.cache, self.editor)

    def method(
        self,
        *,
        excluded: Sequence[int] = (),
        temperature: float = 0.0,
        guidance: float = 0.0,
        seed: int = 0,
        stop_id: int | None = None,
    ) -> Method:
        """The method with these parts; the arguments are those of `LogitsProcessor` and `Method`.

        Raises:
            ConfigError: guidance with a method that verifies what it drafts.
        """
        schedule = self.schedule
        if guidance and isinstance(schedule, SelfSpeculation):
            raise ConfigError(
                f"guidance {guidance}: self-speculation writes what the model decodes token by token, without it; "
                "leave --guidance out, or use another method"
            )
        if "seed" in fields_of(type(schedule)):
            schedule = dataclasses.replace(schedule, seed=seed)  # type: ignore[type-var]
        processor = LogitsProcessor(
            excluded=tuple(excluded),
            temperature=temperature,
            guidance=guidance,
            seed=seed,
        )
        return Method(schedule, self.cache, self.editor, processor, stop_id, self.grid, self.causal_text)


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
    """A preset, with parts replaced by others and single settings changed, fitted to a model.

    Without a preset: fixed steps, no editor, and no cache (on a block-causal model its exact cache).

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
    grid, verifies = objective.block_size, make_objective(objective).verifies
    if base.verifies or schedule == name_of(SelfSpeculation()):
        _require_verifier(preset if schedule is None else None, objective, verifies)
    _require_kind(preset, base, cache, grid, verifies)
    parts: dict[str, Any] = {"schedule": base.schedule, "cache": base.cache, "editor": base.editor}
    for kind, name in (("schedule", schedule), ("cache", cache), ("editor", editor)):
        if name is not None:
            parts[kind] = PARTS[kind][_known(kind, name, PARTS[kind])]()
    if parts["cache"] is None:
        parts["cache"] = NoCache() if grid is None else BlockCausalCache()
    elif cache == "none" and grid is not None:
        parts["cache"] = Recompute()
    parts = _overridden(parts, overrides)
    _require_attention(parts["cache"], grid)
    parts["editor"] = _editing(parts["editor"], model, trained_for_editing or learnt_editing(objective))
    length = _block_length(block_length, base.block_length, grid)
    if isinstance(parts["schedule"], SelfSpeculation):
        parts["schedule"] = _fitted(parts["schedule"], parts["editor"], grid)
        grid = length = None
    return Choice(parts["schedule"], parts["cache"], parts["editor"], length, grid, verifies)


def _require_verifier(preset: str | None, objective: ObjectiveConfig, verifies: bool) -> None:
    """Raises ConfigError for a model that did not learn to verify its drafts."""
    if verifies:
        return
    option = "--schedule self-speculation" if preset is None else f"--preset {preset}"
    raise ConfigError(
        f"{option}: this model was not trained to verify what it drafts (objective.kind {objective.kind}): its causal "
        "pass predicts no next token; train one with objective.kind joint, or use another preset"
    )


def _fitted(schedule: SelfSpeculation, editor: Editor, size: int | None) -> SelfSpeculation:
    """Self-speculation with drafts of the model's blocks. Raises ConfigError for longer ones, and for an editor."""
    if not isinstance(editor, NoEditor):
        raise ConfigError(
            f"editor {name_of(editor)}: self-speculation writes verified tokens, which do not change; leave it out"
        )
    length = size if schedule.draft_length is None else schedule.draft_length
    if size is None or length is None or length > size:
        raise ConfigError(
            f"schedule.draft_length {length}: this model learnt to fill blocks of {size}; use at most {size}"
        )
    return dataclasses.replace(schedule, draft_length=length)


def _known(kind: str, name: str, names: Iterable[str]) -> str:
    if name not in names:
        raise ConfigError(f"--{kind}: no {kind} {name!r}{closest(name, names)}; there are {', '.join(names)}")
    return name


def _overridden(parts: dict[str, Any], overrides: Mapping[str, str]) -> dict[str, Any]:
    """The parts with the settings of `overrides` (keys such as `schedule.threshold`) replaced."""
    nodes: dict[str, list[tuple[yaml.Node, yaml.Node]]] = {kind: [] for kind in parts}
    for key, text in overrides.items():
        kind, _, setting = key.partition(".")
        if kind not in parts:
            raise ConfigError(f"override {key}={text}: settings begin with {', '.join(f'{k}.' for k in parts)}")
        names = list(settings_of(parts[kind]))
        if setting not in names:
            known = f"its settings are {', '.join(names)}" if names else "it has none"
            raise ConfigError(
                f"override {key}={text}: the {kind} {name_of(parts[kind])!r} has no setting {setting!r}"
                f"{closest(setting, names)}; {known}"
            )
        _, node = yaml_nodes.parse_override(f"{key}={text}")
        nodes[kind].append((yaml.ScalarNode(yaml_nodes.STRING_TAG, setting, node.start_mark, node.end_mark), node))
    return {kind: _with(part, nodes[kind]) for kind, part in parts.items()}


def _with(part: Any, values: list[tuple[yaml.Node, yaml.Node]]) -> Any:
    if not values:
        return part
    parsed, _ = parse(type(part), yaml.MappingNode(yaml_nodes.YAML_TAG + "map", values))
    return dataclasses.replace(part, **{key.value: getattr(parsed, key.value) for key, _ in values})


def _require_kind(preset: str | None, base: Preset, cache: str | None, grid: int | None, verifies: bool) -> None:
    """Refuse a preset that is not for models with this kind of attention.

    A preset that only its cache excludes is allowed where the user names another cache.

    Raises:
        ConfigError: the preset is refused.
    """
    if base.causal is None or base.causal == (grid is not None) or (base.causal is False and cache is not None):
        return
    others = ", ".join(
        name
        for name, other in PRESETS.items()
        if other.causal in (None, grid is not None) and (verifies or not other.verifies)
    )
    if base.causal:
        why = "is for block-causal models, whose blocks see nothing behind them; this model's attention is full"
    else:
        why = f"keeps keys approximately; this model is block-causal (block size {grid}), so its exact cache serves"
    raise ConfigError(f"--preset {preset}: {why}; presets for this model: {others}")


def _require_attention(cache: Cache, grid: int | None) -> None:
    """Raises ConfigError for a cache that is not for models with this kind of attention."""
    if cache.causal == (grid is not None):
        return
    fitting = ", ".join(name for name, kind in CACHES.items() if name == "none" or kind.causal == (grid is not None))
    if grid is None:
        why = "is exact for block-causal models only; this model's attention is full: every key depends on all tokens"
    else:
        why = f"is an approximation for bidirectional models; this one is block-causal (block size {grid})"
    raise ConfigError(f"--cache {name_of(cache)}: the cache {why}; use one of {fitting}, or leave --cache out")


def _editing(editor: Editor, model: ModelConfig, trained: bool) -> Editor:
    """The editor with the model's operation ids. Raises ConfigError where the model cannot be edited with it."""
    if not isinstance(editor, TokenEditing | Levenshtein):
        return editor
    if not trained:
        raise ConfigError(
            f"editor {name_of(editor)}: this model was not trained for editing (objective.replace_ratio 0, and no "
            "objective.editing): it never learnt to predict a token at a position that holds one, and editing would "
            "destroy the text; use a model trained with objective.replace_ratio > 0 or objective.editing, or the "
            "editor wino, which needs no training; if this model was trained for it elsewhere, say so with "
            "--trained-for-editing"
        )
    if isinstance(editor, Levenshtein):
        if model.delete_token_id is None or model.insert_token_id is None:
            raise ConfigError(
                "editor levenshtein: the model names no model.delete_token_id and model.insert_token_id, the tokens "
                "that LLaDA2.2 predicts to delete and insert; use the editor token-editing"
            )
        return dataclasses.replace(editor, delete_id=model.delete_token_id, insert_id=model.insert_token_id)
    return editor


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
