"""Quality against forward passes per token, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llada_megatron.llada_moe.errors import ConfigError, ResourceError

_OURS, _PEER, _FRONT = "#1f77b4", "#d62728", "#444444"
_SIZE, _AXES_WIDTH = (11.0, 7.0), 0.57
_NEAR, _LINE = 0.03, 0.03
"""As shares of the axes: what is too close for labels of its own, and from one line of the key to the next."""


class Point(NamedTuple):
    """A sampler in the picture."""

    name: str
    forwards: float
    """Forward passes per token."""
    right: float
    """Share of the sentences that are right."""
    peer: bool
    """Another project's sampler."""
    area: float | None = None
    """AUP over several speeds, where they were measured."""


def require_drawing(path: Path) -> None:
    """Say before anything long starts why a picture cannot be written.

    Raises:
        ResourceError: matplotlib is missing, or the folder.
        ConfigError: a kind of file that it does not write.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        raise ResourceError("--plot needs matplotlib, which is missing; run: pip install matplotlib") from error
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise ConfigError(f"--plot {path}: no kind of picture; the name ends with .{', .'.join(sorted(kinds))}")
    if not path.parent.is_dir():
        raise ResourceError(f"--plot {path}: there is no folder {path.parent}; make it first")


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other one beats in both respects, from the fewest forwards to the highest quality."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.forwards, -point.right)):
        if not best or point.right > best[-1].right:
            best.append(point)
    return best


def draw(path: Path, points: Sequence[Point]) -> None:
    """Write the picture: the fewer forwards and the more right sentences, the better."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=_SIZE, dpi=150, facecolor="white")
    axes = figure.add_axes((0.07, 0.08, _AXES_WIDTH, 0.86))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(ScalarFormatter())
    axes.set_xlabel("forward passes per token (before the end of text)")
    axes.set_ylabel("share of the sentences that are right")
    axes.set_title("Quality against forward passes: the best is above and to the left")
    axes.grid(True, which="both", color="#eeeeee")
    axes.set_axisbelow(True)
    best = front(points)
    axes.step([p.forwards for p in best], [p.right for p in best], where="post", color=_FRONT, label="front", zorder=2)
    for peer, colour, marker, name in ((False, _OURS, "o", "presets"), (True, _PEER, "s", "other projects' own code")):
        some = [point for point in points if point.peer == peer]
        xs, ys = [p.forwards for p in some], [p.right for p in some]
        axes.scatter(xs, ys, c=colour, marker=marker, s=28, zorder=3, label=name)
    axes.legend(loc="lower right", frameon=False)
    _label(axes, points, set(best))
    figure.savefig(path)


def _label(axes: Any, points: Sequence[Point], best: set[Point]) -> None:
    """Numbers at the points, those of close ones together, and beside the axes which number is whose."""
    axes.figure.draw_without_rendering()  # settles what the axes show
    ordered = sorted(points, key=lambda point: (-point.right, point.forwards))
    labels: list[tuple[Point, list[str]]] = []
    for number, point in enumerate(ordered, start=1):
        near = next((numbers for other, numbers in labels if _distance(axes, point, other) < _NEAR), None)
        if near is None:
            labels.append((point, [str(number)]))
        else:
            near.append(str(number))
        axes.text(
            1.03,
            1.0 - number * _LINE,
            f"{number}  {point.name}  ({point.forwards:.2f}, {point.right:.3f}{_area(point)})",
            transform=axes.transAxes,
            fontsize=8,
            fontweight="bold" if point in best else "normal",
            color=_PEER if point.peer else "black",
        )
    for point, numbers in labels:
        place = point.forwards, point.right
        axes.annotate(", ".join(numbers), place, xytext=(3, 4), textcoords="offset points", fontsize=8, zorder=4)


def _area(point: Point) -> str:
    return "" if point.area is None else f", AUP {point.area:.0f}"


def _distance(axes: Any, one: Point, other: Point) -> float:
    """As a share of the axes, the larger one of both directions."""
    here, there = (
        axes.transAxes.inverted().transform(axes.transData.transform((point.forwards, point.right)))
        for point in (one, other)
    )
    return float(abs(here - there).max())
