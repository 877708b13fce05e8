"""Speed and quality in one figure: presets at several speeds, the front, and the area under accuracy and parallelism.

AUP is d3LLM's measure. Of a method whose points are rho tokens per forward pass and an accuracy of y percent, sorted by
rho, those up to the first that is more than 5 percent points below the first one's accuracy count:

    AUP = rho_1 y_1 + sum over i > 1 of (rho_i - rho_(i-1)) (y_i W(y_i) + y_(i-1) W(y_(i-1))) / 2
    W(y) = min(exp(-3 (1 - y / y_best)), 1)

It depends on no hardware, and is only worth something where every forward pass is counted: those that fill a cache or
refresh it, and those that commit nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llada_megatron.console import message
from llada_megatron.llada_moe.errors import ConfigError
from llada_megatron.llada_moe.sampling import schedules
from llada_megatron.llada_moe.sampling.editors import WideIn
from llada_megatron.llada_moe.sampling.presets import PRESETS
from llada_megatron.tools.bench.sampling.candidates import OurSamplers, PresetOnModel
from llada_megatron.tools.bench.sampling.figures import Figures, measure
from llada_megatron.tools.bench.sampling.language import Language

LOSS, STEEPNESS = 5.0, 3.0
"""Percent points of accuracy below the slowest point's at which a curve ends, and how fast less than the best accuracy
loses its weight."""
_THRESHOLDS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.5)
_SPEEDS: dict[type, tuple[str, tuple[Any, ...]]] = {
    schedules.FixedSteps: ("steps", ()),
    schedules.RandomSteps: ("steps", ()),
    schedules.Threshold: ("threshold", _THRESHOLDS),
    schedules.FlooredThreshold: ("threshold", _THRESHOLDS),
    schedules.CreditThreshold: ("threshold", _THRESHOLDS),
    schedules.Stable: ("threshold", _THRESHOLDS),
    schedules.SlowFast: ("threshold", _THRESHOLDS),
    schedules.Hierarchical: ("high", _THRESHOLDS[:-1]),
    schedules.Factor: ("factor", (0.25, 0.5, 1.0, 2.0, 4.0)),
    schedules.EntropyBound: ("gamma", (0.01, 0.05, 0.1, 0.5, 1.0, 2.0)),
    WideIn: ("threshold", _THRESHOLDS[1:]),
}
"""The setting of each schedule that makes it faster or slower, and the values that are tried."""
_STEPS_SAVED = (1, 2, 4, 8)
"""Fixed steps are tried with as many tokens in each."""

_COUNTED = (
    "Tokens before the end of text over all forward passes: those that fill or refresh a cache and those that commit "
    "nothing count as any other. Errors are standard errors over prompts."
)
_FORMULA = (
    "AUP = rho_1 y_1 + sum of (rho_i - rho_(i-1)) (y_i W(y_i) + y_(i-1) W(y_(i-1))) / 2 over the points of a sampler, "
    "up to the first more than 5 points below its slowest, y in percent, W(y) = min(exp(-3 (1 - y / y_best)), 1)"
)


@dataclass(frozen=True)
class SpeedPoint:
    """A sampler with one setting of its speed."""

    tokens_per_forward: float
    """Tokens before the end of text over all forward passes."""
    accuracy: float
    """Share of the sentences that are right."""
    error: float | None
    """Its standard error over prompts."""
    settings: str = ""
    published: bool = False

    @classmethod
    def of(cls, figures: Figures, settings: str = "", published: bool = False) -> SpeedPoint:
        """From what a candidate did with all prompts."""
        per_token = figures.forwards_per_token
        speed = 1 / per_token if math.isfinite(per_token) and per_token > 0 else 0.0
        return cls(speed, figures.right, figures.right_error, settings, published)

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return dict(vars(self))


def speeds_of(preset: PresetOnModel, new_tokens: int) -> list[dict[str, str]]:
    """Overrides of a preset that make it slower or faster, without its published setting; none where nothing does."""
    schedule = PRESETS[preset.preset].schedule
    if type(schedule) not in _SPEEDS:
        return []
    name, values = _SPEEDS[type(schedule)]
    if name == "steps":
        return [{"schedule.steps": str(new_tokens // saved)} for saved in _STEPS_SAVED[1:]]
    return [{f"schedule.{name}": str(value)} for value in values if value != getattr(schedule, name)]


def area_under_parallelism(points: Sequence[SpeedPoint], best: float) -> float | None:
    """AUP of a method. `best`: the greatest accuracy of all methods on the task, in percent; None without a point."""
    ordered = sorted((p for p in points if p.tokens_per_forward > 0), key=lambda point: point.tokens_per_forward)
    if not ordered:
        return None
    pairs = [(point.tokens_per_forward, 100 * point.accuracy) for point in ordered]
    last = next((i for i, (_, y) in enumerate(pairs) if y < pairs[0][1] - LOSS), len(pairs))
    pairs = pairs[:last]
    weighted = [y * min(math.exp(-STEEPNESS * (1 - y / best)), 1.0) if best > 0 else 0.0 for _, y in pairs]
    area = pairs[0][0] * pairs[0][1]
    for i in range(1, len(pairs)):
        area += (pairs[i][0] - pairs[i - 1][0]) * (weighted[i] + weighted[i - 1]) / 2
    return area


def pareto_front(points: Sequence[SpeedPoint]) -> list[SpeedPoint]:
    """Those that no other one beats both in speed and in accuracy, from the fastest to the slowest."""
    found: list[SpeedPoint] = []
    writing = [point for point in points if point.tokens_per_forward > 0]
    for point in sorted(writing, key=lambda each: (-each.tokens_per_forward, -each.accuracy)):
        if not found or point.accuracy > found[-1].accuracy:
            found.append(point)
    return found


def sweep(
    ours: OurSamplers,
    presets: Sequence[PresetOnModel],
    published: dict[str, Figures],
    prompts: Sequence[list[int]],
    language: Language,
    together: int,
) -> dict[str, list[SpeedPoint]]:
    """The points of each preset: with its published settings, and slower and faster.

    Args:
        ours: what makes the candidates.
        presets: those that are tried.
        published: what they did with their published settings, by name.
        prompts: what is to be continued.
        language: of the prompts.
        together: prompts of a turn.
    """
    found: dict[str, list[SpeedPoint]] = {}
    for preset in presets:
        points = [SpeedPoint.of(published[preset.name], "as published", published=True)]
        for overrides in speeds_of(preset, ours.new_tokens):
            told = ", ".join(f"{key}={value}" for key, value in overrides.items())
            try:
                candidate = ours.candidate(preset, overrides=overrides)
            except ConfigError as error:
                message(f"{preset.name}, {told} is left out: {error}")
                continue
            message(f"{preset.name}, {told}")
            measured = measure([candidate], prompts, language, 1, together, quiet=True)
            points.append(SpeedPoint.of(measured[candidate.name], told))
        found[preset.name] = points
    return found


def area_table(record: dict[str, Any]) -> str:
    """The samplers by their AUP, as text."""
    rows = sorted(record["samplers"], key=lambda each: -(each["aup"] or 0.0))
    width = max(len(each["name"]) for each in rows)
    lines = [f"{'sampler':<{width}}  {'AUP':>7}  points, as tokens per forward pass: share right ± standard error"]
    for each in rows:
        area = "-" if each["aup"] is None else f"{each['aup']:.1f}"
        points = "  ".join(_point_text(point) for point in each["points"])
        lines.append(f"{each['name']:<{width}}  {area:>7}  {points}")
    return "\n".join(lines)


def _point_text(point: dict[str, Any]) -> str:
    error = "" if point["error"] is None else f" ± {point['error']:.3f}"
    return f"{point['tokens_per_forward']:.2f}: {point['accuracy']:.3f}{error}"


def speed_record(samplers: dict[str, list[SpeedPoint]], protocol: dict[str, Any]) -> dict[str, Any]:
    """What `llada bench sample --output` writes and `llada eval report` reads.

    Args:
        samplers: the points of each sampler by its name.
        protocol: what they were measured by.
    """
    every = [point for points in samplers.values() for point in points]
    best = max((100 * point.accuracy for point in every), default=0.0)
    front = pareto_front(every)
    return {
        "kind": "samplers",
        "task": "sentences of the small language of llada bench sample that are right",
        "counted": _COUNTED,
        "aup_formula": f"{_FORMULA}, y_best = {best:.2f}, the best of all samplers here (d3LLM).",
        "protocol": protocol,
        "samplers": [
            {
                "name": name,
                "aup": area_under_parallelism(points, best),
                "points": [
                    point.record() | {"on_front": any(point is each for each in front)}
                    for point in sorted(points, key=lambda each: each.tokens_per_forward)
                ],
            }
            for name, points in samplers.items()
        ],
    }
