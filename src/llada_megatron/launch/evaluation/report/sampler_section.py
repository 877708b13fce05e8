"""Speed and quality of sampling presets, from `llada bench sample --output`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from llada_megatron.launch.evaluation.report.figure_text import flat, number, with_error
from llada_megatron.launch.evaluation.report.report_inputs import KINDS, ReportInputs
from llada_megatron.pages.charts import Chart, Mark, Series, drawn
from llada_megatron.pages.document import folded, paragraph, table


def samplers_section(found: ReportInputs) -> Iterator[str]:
    """Accuracy over tokens per forward pass of every sampler, the front, and one figure for both."""
    yield "<h2>Samplers: speed and quality</h2>"
    files = found.of_kind("samplers")
    if not files:
        yield paragraph(f"No figures of samplers were given; {KINDS['samplers']} FILE.json writes them.", "note")
    for number_, file in enumerate(files):
        yield from _figures(file.path.name, file.content, f"samplers-{number_}")


def _figures(name: str, content: dict[str, Any], identity: str) -> Iterator[str]:
    groups = content["samplers"]
    points = [(group["name"], point) for group in groups for point in group["points"]]
    series = [
        Series(title, [_mark(who, point) for who, point in points if point["on_front"] == on])
        for title, on in (("front: no other point is faster and better", True), ("other points", False))
    ]
    chart = Chart(f"{name}: {content['task']}", series, "tokens per forward pass", "right", lines=False)
    yield f'<div class="charts">{drawn(chart, identity)}</div>'
    yield paragraph(content["counted"], "note")
    rows = [
        [
            group["name"],
            "" if point.get("settings") is None else point["settings"],
            number(point["tokens_per_forward"], 3),
            with_error(point["accuracy"], point["error"]),
            "published" if point.get("published") else "",
            "on the front" if point["on_front"] else "",
        ]
        for group in sorted(groups, key=lambda group: -(group["aup"] or 0.0))
        for point in group["points"]
    ]
    areas = [[g["name"], len(g["points"]), number(g["aup"], 4)] for g in sorted(groups, key=lambda g: -(g["aup"] or 0))]
    yield paragraph(content["aup_formula"], "note")
    yield table(["sampler", "points", "AUP"], areas, f"{identity}-aup")
    head = ["sampler", "settings", "tokens / forward", "right", "", ""]
    yield folded("Every point", table(head, rows, f"{identity}-points", words=2))
    yield folded("Protocol", table(["setting", "value"], flat(content["protocol"]), words=2))


def _mark(who: str, point: dict[str, Any]) -> Mark:
    accuracy, error = point["accuracy"], point["error"]
    low, high = (None, None) if error is None else (accuracy - error, accuracy + error)
    label = f"{who} {point.get('settings') or ''}: {point['tokens_per_forward']:.2f}, {accuracy:.3f}"
    return Mark(point["tokens_per_forward"], accuracy, low, high, label)
