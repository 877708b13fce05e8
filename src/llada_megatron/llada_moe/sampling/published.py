"""The parts of a sampling method by name, and published methods with their published settings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llada_megatron.llada_moe.config.parsing import fields_of
from llada_megatron.llada_moe.sampling import caches, schedules
from llada_megatron.llada_moe.sampling.caches import Cache, DualCache, PrefixCache, VicinityCache
from llada_megatron.llada_moe.sampling.editors import Editor, Levenshtein, NoEditor, TokenEditing, WideIn, Wino
from llada_megatron.llada_moe.sampling.schedules import (
    CreditThreshold,
    EntropyBound,
    Factor,
    FixedSteps,
    FlooredThreshold,
    Hierarchical,
    RandomSteps,
    Schedule,
    SelfSpeculation,
    SlowFast,
    Stable,
    Threshold,
)

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
    "self-speculation": SelfSpeculation,
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
"""Fields that are set from the seed of the run or from the model, not by the user."""


def name_of(part: Any) -> str:
    """The name of a schedule, cache or editor."""
    return next(name for kinds in PARTS.values() for name, kind in kinds.items() if type(part) is kind)


def settings_of(part: Any) -> dict[str, Any]:
    """The settings of a schedule, cache or editor that a user can change."""
    return {name: getattr(part, name) for name in fields_of(type(part)) if name not in _GIVEN_ELSEWHERE}


def in_words(schedule: Any, cache: Any, editor: Any) -> str:
    """The parts of a method and their settings in one line. A cache that is None is not mentioned."""
    words = []
    for kind, part in (("schedule", schedule), ("cache", cache), ("editor", editor)):
        if part is not None and not isinstance(part, NoEditor):
            settings = [f"{key}={value}" for key, value in settings_of(part).items() if value is not None]
            words.append(" ".join([kind, name_of(part), *settings]))
    return "; ".join(words)


@dataclass(frozen=True)
class Preset:
    """A published method."""

    does: str
    """What the method does, in a few words."""
    source: str
    """Where the method and its settings were published."""
    schedule: Schedule
    cache: Cache | None = None
    """None = what is exact for the model: the block-causal cache, or no cache."""
    editor: Editor = field(default_factory=NoEditor)
    block_length: int | None = None
    """Published length of a block on a bidirectional model; None = one single block."""
    causal: bool | None = None
    """Whether it is for block-causal models (True), for bidirectional ones (False), or for both (None)."""

    @property
    def verifies(self) -> bool:
        """Whether it is for models alone that were trained to verify their drafts (objective joint)."""
        return isinstance(self.schedule, SelfSpeculation)

    @property
    def models(self) -> str:
        """The models that it is for, in words."""
        return "joint" if self.verifies else {True: "block-causal", False: "bidirectional", None: "all"}[self.causal]


_FAST_DLLM = "Fast-dLLM, arXiv 2505.22618, and its evaluation scripts"

_DINFER = "dInfer, arXiv 2510.08666, and its evaluation guide (LLaDA-MoE), without iteration smoothing"

_LLADA21 = "LLaDA2.1 report"

PRESETS: dict[str, Preset] = {
    "llada": Preset(
        "the most confident token of each step; fewer steps with schedule.steps",
        "LLaDA, arXiv 2502.09992, and its generate.py",
        FixedSteps(),
        block_length=32,
    ),
    "llada-random": Preset(
        "a random token in each step: the plain reverse process",
        "LLaDA, arXiv 2502.09992, algorithm 4, and its generate.py",
        RandomSteps(),
        block_length=32,
    ),
    "fast-dllm": Preset(
        "all tokens of at least a probability, and the best one",
        _FAST_DLLM,
        Threshold(0.9),
        block_length=32,
    ),
    "fast-dllm-prefix": Preset(
        "the same; keys before the block are kept from its first step",
        _FAST_DLLM,
        Threshold(0.9),
        PrefixCache(),
        block_length=32,
        causal=False,
    ),
    "fast-dllm-dual": Preset(
        "the same; keys before and behind the block are kept from its first step",
        _FAST_DLLM,
        Threshold(0.9),
        DualCache(),
        block_length=32,
        causal=False,
    ),
    "fast-dllm-factor": Preset(
        "the more tokens, the more confident all of them are",
        _FAST_DLLM,
        Factor(1.0),
        block_length=32,
    ),
    "fast-dllm-factor-dual": Preset(
        "the same; keys before and behind the block are kept from its first step",
        _FAST_DLLM,
        Factor(1.0),
        DualCache(),
        block_length=32,
        causal=False,
    ),
    "dinfer-vicinity": Preset(
        "all tokens of at least a probability; cached keys, recomputed around the block",
        _DINFER,
        Threshold(0.8),
        VicinityCache(),
        block_length=64,
        causal=False,
    ),
    "dinfer-hierarchical": Preset(
        "the best token of every run of masks, and all very confident ones",
        _DINFER,
        Hierarchical(0.92, 0.62),
        VicinityCache(),
        block_length=64,
        causal=False,
    ),
    "dinfer-credit": Preset(
        "all tokens of at least a probability, which grows while the model repeats them",
        _DINFER,
        CreditThreshold(0.8, 0.7, 0.8, 0.2),
        VicinityCache(),
        block_length=64,
        causal=False,
    ),
    "eb-sampler": Preset(
        "as many tokens as a bound on their joint entropy allows",
        "EB-Sampler, arXiv 2505.24857, which varies gamma from model to model",
        EntropyBound(0.1),
        block_length=32,
    ),
    "slowfast": Preset(
        "slow steps find how far the model is confident, fast ones sample the text up to there",
        "SlowFast sampling, arXiv 2506.10848, and its code, whose scripts have one block",
        SlowFast(),
    ),
    "klass": Preset(
        "confident tokens whose distribution has stopped changing",
        "KLASS, arXiv 2511.05664: defaults of its code (its scripts have 0.6 and 0.015 for GSM8K)",
        Stable(0.9, 0.01, 2),
        block_length=64,
    ),
    "wino": Preset(
        "many tokens at once; those that later tokens make improbable are masked again",
        "WINO, arXiv 2507.18578, and its configuration files",
        WideIn(0.6),
        editor=Wino(0.9),
        block_length=128,
    ),
    "llada2": Preset(
        "all tokens above a probability, and at least one; cached keys are exact",
        "LLaDA2.0 report",
        FlooredThreshold(0.95, 32),
        causal=True,
    ),
    "llada2.1-speed": Preset(
        "commits early and corrects tokens later",
        f"{_LLADA21} (S mode), settings of SGLang",
        FlooredThreshold(0.5, None),
        editor=TokenEditing(0.0, 16),
        causal=True,
    ),
    "llada2.1-quality": Preset(
        "commits later and corrects tokens when confident",
        f"{_LLADA21} (Q mode), settings of its example for diffusers",
        FlooredThreshold(0.7, None),
        editor=TokenEditing(0.5, 16),
        causal=True,
    ),
    "llada2.1-multi-block": Preset(
        "the same, and corrects the previous block too",
        f"{_LLADA21} (multi-block editing), which does not say how many blocks",
        FlooredThreshold(0.7, None),
        editor=TokenEditing(0.5, 16, 1),
        causal=True,
    ),
    "llada2.2": Preset(
        "corrects, deletes and inserts tokens",
        "LLaDA2.2 report, settings of SGLang",
        FlooredThreshold(0.5, None),
        editor=Levenshtein(0.0, 16),
        causal=True,
    ),
    "self-speculation": Preset(
        "drafts a block and verifies it causally: the tokens of decoding token by token, several at a time",
        "Nemotron-Labs-Diffusion (self-speculation), which also drafts from every place of a draft at once",
        SelfSpeculation(),
        causal=True,
    ),
    "autoregressive": Preset(
        "decodes token by token, without drafts: what self-speculation writes",
        "any autoregressive model",
        SelfSpeculation(draft_length=0),
        causal=True,
    ),
}


def describe() -> list[dict[str, str]]:
    """For every preset its name, what it does, its settings, the models it is for, and its source."""
    return [
        {
            "name": name,
            "does": preset.does,
            "settings": _settings(preset),
            "models": preset.models,
            "source": preset.source,
        }
        for name, preset in PRESETS.items()
    ]


def table() -> str:
    """The presets as text for a terminal."""
    entries = [
        f"{row['name']}: {row['does']}\n    {row['settings']}\n    for {row['models']} models; {row['source']}"
        for row in describe()
    ]
    return "\n".join(entries)


def _settings(preset: Preset) -> str:
    words = in_words(preset.schedule, preset.cache, preset.editor)
    return words if preset.block_length is None else f"{words}; block length {preset.block_length}"
