"""Charts as SVG inside a page: lines and marks of series, which differ in colour, in dashes and in shape.

A chart is a picture with a text that says what it shows; whoever draws one puts its figures into a table beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from llada_megatron.pages.document import COLOURS

WIDTH, HEIGHT = 460, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 40
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_LOGARITHMIC_FROM = 30.0
"""Ratio of the greatest to the least value from which an axis that may be logarithmic is."""


@dataclass(frozen=True)
class Mark:
    """A value in a chart."""

    x: float
    y: float
    low: float | None = None
    """End of the bar or of the band below it: a standard error, or the least of what was summed up."""
    high: float | None = None
    label: str = ""
    """What a pointer is told over it."""


@dataclass(frozen=True)
class Series:
    """The values of one run, writer or sampler."""

    name: str
    marks: Sequence[Mark]
    missing: Sequence[float] = ()
    """Places on the horizontal axis whose value is not a number: crosses at the upper edge."""


@dataclass(frozen=True)
class Chart:
    """A chart of some series."""

    title: str
    series: Sequence[Series]
    across: str
    """Name of the horizontal axis."""
    up: str
    """Name of the vertical axis."""
    lines: bool = True
    """The marks of a series are joined, and `low` to `high` is a band; otherwise they are shapes with bars."""
    logarithmic: tuple[bool, bool] = (False, False)
    """Whether each axis may be: it is where its values are far apart and all above 0."""
    ticks: Sequence[float] = field(default=())
    """Where the horizontal axis is written at, instead of round numbers."""


class _Axis:
    """A range of values on a length of the picture."""

    def __init__(self, values: Iterable[float], start: float, end: float, may_be_logarithmic: bool) -> None:
        found = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        low, high = min(found), max(found)
        self.logarithmic = may_be_logarithmic and low > 0 and high / low >= _LOGARITHMIC_FROM
        if self.logarithmic:
            low, high = math.log10(low), math.log10(high)
        room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
        self._low, self._high, self._start, self._end = low - room, high + room, start, end

    def at(self, value: float) -> float:
        """Where a value lies."""
        value = math.log10(max(value, 1e-300)) if self.logarithmic else value
        return self._start + (value - self._low) / (self._high - self._low) * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Some round values of the range."""
        if self.logarithmic:
            first, last = math.ceil(self._low), math.floor(self._high)
            powers = range(first, last + 1, max(1, (last - first) // 5))
            return [10.0**power for power in powers]
        step = 10.0 ** math.floor(math.log10((self._high - self._low) / 4))
        step *= next(each for each in (1, 2, 5, 10) if (self._high - self._low) / (step * each) <= 6)
        first = math.ceil(self._low / step)
        return [step * number for number in range(first, math.floor(self._high / step) + 1)]


def drawn(chart: Chart, name: str) -> str:
    """A chart as a figure with its key. `name`: of letters and digits, another one for each chart of a page."""
    marks = [mark for each in chart.series for mark in each.marks]
    ends = [value for mark in marks for value in (mark.y, mark.low, mark.high) if value is not None]
    places = [mark.x for mark in marks] + [place for each in chart.series for place in each.missing]
    across = _Axis([*places, *chart.ticks], _LEFT, WIDTH - _RIGHT, chart.logarithmic[0])
    up = _Axis(ends, HEIGHT - _BOTTOM, _TOP, chart.logarithmic[1])
    inside = [*_frame(chart, across, up)]
    for number, series in enumerate(chart.series):
        inside += _series(series, number, across, up, chart.lines)
    labels = f'role="img" aria-labelledby="{name}-title {name}-text"'
    title, text = escape(chart.title), escape(described(chart))
    return (
        f'<figure class="chart"><figcaption><b>{title}</b>{_key(chart)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" {labels}>'
        f'<title id="{name}-title">{title}</title><desc id="{name}-text">{text}</desc>'
        + "".join(inside)
        + "</svg></figure>"
    )


def described(chart: Chart) -> str:
    """What the picture shows, for those who do not see it."""
    texts = []
    for series in chart.series:
        if not series.marks:
            texts.append(f"{series.name}: no value")
            continue
        first, last = series.marks[0], series.marks[-1]
        if chart.lines:
            least = min(mark.y for mark in series.marks)
            text = f"{series.name}: {first.y:.4g} at {first.x:.6g}, {last.y:.4g} at {last.x:.6g}, least {least:.4g}"
        else:
            text = f"{series.name}: " + "; ".join(f"{mark.y:.4g} at {mark.x:.4g}" for mark in series.marks[:8])
        texts.append(text + (f"; not a number in {len(series.missing)} places" if series.missing else ""))
    return f"{chart.up} over {chart.across}. " + ". ".join(texts) + "."


def _frame(chart: Chart, across: _Axis, up: _Axis) -> Iterable[str]:
    left, right, top, bottom = _LEFT, WIDTH - _RIGHT, _TOP, HEIGHT - _BOTTOM
    for value in up.ticks():
        y = up.at(value)
        yield f'<line x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
        yield _text(left - 6, y + 4, _number(value), "end")
    for value in chart.ticks or across.ticks():
        x = across.at(value)
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}" stroke="var(--line)"/>'
        yield _text(x, bottom + 16, _number(value), "middle")
    scales = [f"{name}{', logarithmic' * axis.logarithmic}" for name, axis in ((chart.across, across), (chart.up, up))]
    size = f'width="{right - left}" height="{bottom - top}"'
    yield f'<rect x="{left}" y="{top}" {size} fill="none" stroke="var(--faint)"/>'
    yield _text((left + right) / 2, HEIGHT - 5, scales[0], "middle")
    yield (
        f'<text transform="translate(12 {(top + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(scales[1])}</text>"
    )


def _series(series: Series, number: int, across: _Axis, up: _Axis, lines: bool) -> Iterable[str]:
    colour = COLOURS[number % len(COLOURS)]
    marks = series.marks
    if lines and len(marks) > 1:
        if any(mark.low is not None for mark in marks):
            above = [f"{across.at(m.x):.1f},{up.at(m.y if m.high is None else m.high):.1f}" for m in marks]
            below = [f"{across.at(m.x):.1f},{up.at(m.y if m.low is None else m.low):.1f}" for m in reversed(marks)]
            yield f'<polygon points="{" ".join([*above, *below])}" fill="{colour}" opacity="0.2"/>'
        points = " ".join(f"{across.at(mark.x):.1f},{up.at(mark.y):.1f}" for mark in marks)
        yield f'<polyline points="{points}" fill="none" {_stroke(number)}/>'
    if not lines or len(marks) <= 40:
        for mark in marks:
            yield from _mark(mark, number, colour, across, up, bar=not lines or len(marks) == 1)
    for place in series.missing:
        yield f'<path d="M{across.at(place):.1f} {_TOP + 1}m-4 0l8 8m0 -8l-8 8" stroke="{colour}" stroke-width="2"/>'


def _stroke(number: int) -> str:
    """Colour and dashes: all lines of the first colours differ in both, for those who see no colours."""
    dashes = _DASHES[(number + number // len(COLOURS)) % len(_DASHES)]
    return f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="1.8" stroke-dasharray="{dashes}"'


def _mark(mark: Mark, number: int, colour: str, across: _Axis, up: _Axis, bar: bool) -> Iterable[str]:
    x, y = across.at(mark.x), up.at(mark.y)
    if bar and mark.low is not None and mark.high is not None:
        low, high = up.at(mark.low), up.at(mark.high)
        yield f'<path d="M{x:.1f} {low:.1f}V{high:.1f}m-3 0h6M{x - 3:.1f} {low:.1f}h6" stroke="{colour}" fill="none"/>'
    told = f"<title>{escape(mark.label)}</title>" if mark.label else ""
    yield f'<path d="M{x:.1f} {y:.1f}{_shape(number)}" fill="{colour}">{told}</path>'


def _shape(number: int) -> str:
    """A circle, a square, a triangle or a diamond around the present point."""
    return (
        "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0",
        "m-3.5 -3.5h7v7h-7z",
        "m0 -4.5l4.5 8h-9z",
        "m0 -5l5 5l-5 5l-5 -5z",
    )[number % 4]


def _key(chart: Chart) -> str:
    """Which line or mark is whose; nothing for a single series without a name."""
    parts = []
    for number, series in enumerate(chart.series):
        colour = COLOURS[number % len(COLOURS)]
        line = f'<path d="M0 6H26" {_stroke(number)}/>' * chart.lines
        mark = f'<path d="M13 6{_shape(number)}" fill="{colour}"/>'
        parts.append(
            f'<span class="key"><svg width="26" height="12" aria-hidden="true">{line}{mark}</svg> '
            f"{escape(series.name)}</span>"
        )
    return "<br>" + " ".join(parts) if any(series.name for series in chart.series) else ""


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _number(value: float) -> str:
    """A value of an axis: `0.25`, `2,000`, `1e-05`."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
