"""Bounds along the runs of `llada bench ar-to-diffusion`, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from llada_megatron.llada_moe.config.block_schedule import named_stages, tokens_per_step
from llada_megatron.tools.bench.conversion_arms import BLOCKS, EXACT, SCHEDULE, WHOLE, TrainedArm

if TYPE_CHECKING:
    from llada_megatron.llada_moe.config.run import RunConfig
    from llada_megatron.parallel.evaluation.assessment import Baselines

_COLOURS = ("#1f77b4", "#d62728", "#7f7f7f", "#2ca02c")
_AUTOREGRESSIVE = "#444444"
_ABOVE_UNIGRAMS = 1.08
"""The largest cost that is shown, as a share of the unigrams': a conversion begins far above."""


def draw(path: Path, found: Mapping[str, Sequence[TrainedArm]], base: RunConfig, others: Baselines) -> None:
    """Write the picture: both bounds against the tokens of text, mean and standard deviation over the seeds.

    All runs end at the same place: one from scratch on fewer tokens begins where the conversions do.
    """
    from matplotlib.figure import Figure

    size, total = tokens_per_step(base.training), base.training.steps
    figure = Figure(figsize=(12.0, 5.2), facecolor="white", layout="constrained")
    for axes, bound in zip(figure.subplots(1, 2, sharey=True), (BLOCKS, WHOLE), strict=True):
        for (name, seeds), colour in zip(found.items(), _COLOURS, strict=True):
            offset = total - seeds[0].points[-1].step
            _line(axes, seeds, bound, colour, name, offset, size)
        _line(axes, found[SCHEDULE], EXACT, _AUTOREGRESSIVE, "autoregressive, exact cost of next tokens", 0, size)
        _references(axes, others)
        _stages(axes, base, size)
        axes.set_xlabel("tokens of text")
        axes.set_title(f"bound over {bound}" + (f" ({base.objective.block_size})" if bound == BLOCKS else ""))
        axes.set_ylim(top=_ABOVE_UNIGRAMS * others.unigram)
    figure.axes[0].set_ylabel("bits per byte of held-out text")
    figure.axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)


def _line(axes: Any, seeds: Sequence[TrainedArm], figure: str, colour: str, name: str, offset: int, size: int) -> None:
    """Mean and standard deviation of a figure at each checkpoint that has it."""
    points = [
        [(point.step, point.bits_per_byte[figure]) for point in one.points if figure in point.bits_per_byte]
        for one in seeds
    ]
    columns = list(zip(*points, strict=True))
    xs = [(column[0][0] + offset) * size for column in columns]
    values = [[value for _, value in column] for column in columns]
    errors = [stdev(each) if len(each) > 1 else 0.0 for each in values]
    means = [mean(each) for each in values]
    axes.errorbar(xs, means, yerr=errors, color=colour, label=name, marker="o", markersize=3, capsize=2, linewidth=1.2)


def _references(axes: Any, others: Baselines) -> None:
    """What the same text costs without a neural model."""
    for name, value in (("unigrams", others.unigram), ("bigrams", others.bigram), ("zlib", others.zlib)):
        axes.axhline(value, color="#bbbbbb", linewidth=0.8, linestyle="--", zorder=0)
        axes.annotate(name, (0.0, value), xytext=(2, 2), textcoords="offset points", fontsize=7, color="#888888")


def _stages(axes: Any, base: RunConfig, size: int) -> None:
    """Where the stages of the schedule begin, with their block sizes."""
    schedule = base.objective.block_schedule  # type: ignore[attr-defined]
    starts = [schedule.autoregressive_steps(size), *schedule.ends(size)]
    top = axes.get_xaxis_transform()
    for (_, stage), start, end in zip(named_stages(schedule), starts, starts[1:], strict=False):
        axes.axvline(start * size, color="#dddddd", linewidth=0.8, zorder=0)
        middle = (start + end) / 2 * size
        axes.text(middle, 0.985, str(stage.block_size), transform=top, ha="center", va="top", fontsize=7)
    axes.text(starts[0] * size / 2, 0.985, "next tokens", transform=top, ha="center", va="top", fontsize=7)
