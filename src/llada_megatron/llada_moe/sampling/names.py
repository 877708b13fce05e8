"""The parts of a sampling method by name, and their settings."""

from __future__ import annotations

from typing import Any

from llada_megatron.llada_moe.config.parsing import fields_of
from llada_megatron.llada_moe.sampling import caches, schedules
from llada_megatron.llada_moe.sampling.editors import Levenshtein, NoEditor, TokenEditing, WideIn, Wino

SCHEDULES: dict[str, type] = {
    "steps": schedules.FixedSteps,
    "random": schedules.RandomSteps,
    "threshold": schedules.Threshold,
    "floored-threshold": schedules.FlooredThreshold,
    "factor": schedules.Factor,
    "entropy-bound": schedules.EntropyBound,
    "hierarchical": schedules.Hierarchical,
    "credit": schedules.CreditThreshold,
    "slowfast": schedules.SlowFast,
    "stable": schedules.Stable,
    "wide-in": WideIn,
}
CACHES: dict[str, type] = {
    "none": caches.NoCache,
    "recompute": caches.Recompute,
    "prefix": caches.PrefixCache,
    "dual": caches.DualCache,
    "vicinity": caches.VicinityCache,
    "refreshed": caches.RefreshedCache,
    "block-causal": caches.BlockCausalCache,
}
EDITORS: dict[str, type] = {
    "none": NoEditor,
    "token-editing": TokenEditing,
    "levenshtein": Levenshtein,
    "wino": Wino,
}
PARTS = {"schedule": SCHEDULES, "cache": CACHES, "editor": EDITORS}
_GIVEN_ELSEWHERE = {"seed", "delete_id", "insert_id"}
"""Fields that a run's seed or the model decides."""


def name_of(part: Any) -> str:
    """The name of a schedule, cache or editor."""
    return next(name for kinds in PARTS.values() for name, kind in kinds.items() if type(part) is kind)


def settings_of(part: Any) -> dict[str, Any]:
    """The settings of a schedule, cache or editor that a user can change."""
    return {name: getattr(part, name) for name in fields_of(type(part)) if name not in _GIVEN_ELSEWHERE}


def in_words(schedule: Any, cache: Any, editor: Any) -> str:
    """The parts of a method and their settings in one line; a cache that is None is left out."""
    words = []
    for kind, part in (("schedule", schedule), ("cache", cache), ("editor", editor)):
        if part is not None and not isinstance(part, NoEditor):
            settings = [f"{key}={value}" for key, value in settings_of(part).items() if value is not None]
            words.append(" ".join([kind, name_of(part), *settings]))
    return "; ".join(words)
