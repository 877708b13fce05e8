"""Where the tokens of models with experts go: over the steps, in the last interval, and in profiles of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from llada_megatron.launch.evaluation.report.figure_text import NONE, number
from llada_megatron.launch.evaluation.report.report_inputs import KINDS, ReportedRun, ReportInputs
from llada_megatron.llada_moe.evaluation.expert_balance import balance_of
from llada_megatron.pages.charts import Chart, Series, drawn
from llada_megatron.pages.document import image_figure, items, paragraph, table
from llada_megatron.pages.heatmaps import data_uri, heatmap, relative

_HEAD = ["model", "layer", "busiest / mean", "variation", "entropy", "dead", "overloaded", "experts"]
_KEY = "white: no tokens, blue: the mean of the layer, red: twice the mean and more"


def experts_section(found: ReportInputs) -> Iterator[str]:
    """The load of experts."""
    yield "<h2>Expert load</h2>"
    runs = [run for run in found.runs if run.curves.experts or run.curves.curves["expert_load/max_over_mean"].values]
    profiles = found.of_kind("experts")
    if not runs and not profiles:
        yield paragraph(
            f"No run with experts that says where tokens go was given, and no profile ({KINDS['experts']}).", "note"
        )
        return
    series = [(run.name, run.curves.curves["expert_load/max_over_mean"]) for run in runs]
    if any(curve.values for _, curve in series):
        chart = Chart(
            "Busiest expert of the worst layer",
            [Series(n, c.marks, c.missing) for n, c in series],
            "step",
            "times the mean",
        )
        yield f'<div class="charts">{drawn(chart, "expert-load")}</div>'
        dead = [(run.name, run.curves.curves["expert_load/dead"].last) for run in runs]
        yield items(
            f"{name}: {number(last[1])} experts without a token at step {last[0]:,}" for name, last in dead if last
        )
    rows: list[list[str]] = []
    for run in runs:
        counts = _counts(run)
        if counts:
            step = run.curves.experts["step"] if run.curves.experts else NONE
            title = f"{run.name}, interval that ends with step {step:,}"
            yield _picture(title, counts)
            rows += _rows(run.name, counts)
        else:
            yield paragraph(f"{run.name}: there is no experts.jsonl, or no whole line in it.", "note")
    for file in profiles:
        layers = {layer: facts["tokens"] for layer, facts in file.content["layers"].items()}
        yield _picture(f"{file.path.name}: profile of {file.content.get('checkpoint', 'a checkpoint')}", layers)
        rows += _rows(str(file.content.get("checkpoint", file.path.name)), layers)
    if rows:
        yield table(_HEAD, rows, "experts", words=1)


def _counts(run: ReportedRun) -> dict[str, list[int]]:
    """Tokens by layer, `[experts]`, over all mask ratios, of the last interval."""
    tokens: Any = (run.curves.experts or {}).get("tokens")
    if not isinstance(tokens, dict):
        return {}
    return {layer: np.array(bins).sum(axis=0).tolist() for layer, bins in tokens.items()}


def _picture(title: str, counts: dict[str, list[int]]) -> str:
    values = np.array(list(counts.values()))
    cell = max(1, 512 // values.shape[1])
    layers = ", ".join(counts)
    caption = f"{title}. Layers {layers} from top to bottom, {values.shape[1]} experts from left to right; {_KEY}."
    return image_figure(data_uri(heatmap(relative(values), cell)), caption)


def _rows(name: str, counts: dict[str, list[int]]) -> Iterator[list[str]]:
    for layer, tokens in counts.items():
        found = balance_of(tokens)
        yield [
            name,
            layer,
            f"{found.max_over_mean:.2f}",
            f"{found.variation:.2f}",
            f"{found.entropy:.3f}",
            str(found.dead),
            str(found.overloaded),
            str(len(tokens)),
        ]
