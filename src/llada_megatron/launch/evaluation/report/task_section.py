"""Results of tasks: every number with its standard error, beside the protocol that it was measured by."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from typing import Any

from llada_megatron.launch.evaluation.report.figure_text import NONE, flat, number, with_error
from llada_megatron.launch.evaluation.report.report_inputs import KINDS, ReportedFile, ReportInputs
from llada_megatron.pages.charts import Chart, Mark, Series, drawn
from llada_megatron.pages.document import counted, folded, paragraph, table

_HEAD = ["model", "task", "figure", "value", "of", "protocol"]
_QUESTIONS = ("acc", "acc_norm")
_TEXTS = ("nats_per_token", "bits_per_byte")


def tasks_section(found: ReportInputs) -> Iterator[str]:
    """Likelihood, lm_eval, infilling and the reversal curse."""
    yield "<h2>Tasks</h2>"
    rows = [row for file in found.of_kind("likelihood") for row in _likelihood(file, found)]
    parts = [part for file in found.of_kind("harness") for part in file.content["parts"]]
    rows += [row for part in parts for row in _harness(part, found)]
    rows += [row for run in found.runs if run.demo for row in _demo(run.name, run.demo)]
    if rows:
        yield table(_HEAD, rows, "tasks", words=3)
    else:
        yield _none("tasks", "likelihood", "harness")
    for file in found.of_kind("harness"):
        yield from _published(file)
    yield "<h3>Infilling</h3>"
    infilled = found.of_kind("infill")
    if infilled:
        yield from _infilling(found)
    else:
        yield _none("infilling", "infill")
    yield "<h3>Reversal</h3>"
    reversals = found.of_kind("reversal")
    for file in reversals:
        yield from _reversal(file)
    if not reversals:
        yield _none("the reversal curse", "reversal")
    files = [*found.of_kind("likelihood"), *found.of_kind("harness"), *infilled, *reversals]
    if files:
        yield "<h3>Protocols</h3>"
        yield paragraph("Figures that were measured by two protocols cannot be compared.", "note")
    for file in files:
        for settings in _protocols(file):
            yield folded(f"{file.path.name}: {KINDS[file.kind]}", table(["setting", "value"], flat(settings), words=2))


def _protocols(file: ReportedFile) -> list[dict[str, Any]]:
    if file.kind == "likelihood":
        return [file.content[0]["protocol"]]
    return [part.get("protocol", {}) for part in file.content.get("parts", [file.content])]


def _none(what: str, *kinds: str) -> str:
    commands = " and ".join(KINDS[kind] for kind in kinds)
    return paragraph(f"No results of {what} were given; {commands} write them.", "note")


def _likelihood(file: ReportedFile, found: ReportInputs) -> Iterator[list[str]]:
    from llada_megatron.llada_moe.evaluation.likelihood_scores import summarised

    protocol, *records = (file.content[0]["protocol"], *file.content[1:])
    summary = summarised(records).record()
    told = _short(protocol) + f"; {protocol.get('precision', 'precision not known')}"
    for names, count, of in ((_QUESTIONS, summary["questions"], "question"), (_TEXTS, summary["texts"], "text")):
        for name in names:
            figure = summary[name]
            if figure is not None:
                value = with_error(figure["value"], figure["error"])
                model = found.run_of(protocol.get("checkpoint"))
                yield [model, file.path.name, name.replace("_", " "), value, counted(count, of), told]
    if summary["questions"]:
        model = found.run_of(protocol.get("checkpoint"))
        told = "questions whose best two options are within 2 standard errors"
        yield [
            model,
            file.path.name,
            "undecided",
            str(summary["undecided"]),
            counted(summary["questions"], "question"),
            told,
        ]


def _short(protocol: dict[str, Any]) -> str:
    """The settings of a likelihood in one line."""
    name = str(protocol.get("estimator") or "estimator not known")
    drawn = [
        f"{protocol[key]} {word}" for key, word in (("samples", "samples"), ("stratum", "a stratum")) if key in protocol
    ]
    drawn += [f"seed {protocol['seed']}"] if "seed" in protocol else []
    guidance = protocol.get("guidance")
    return ", ".join([name, *drawn, f"guidance {guidance:g}" if guidance else "no guidance"])


def _published(file: ReportedFile) -> Iterator[str]:
    """What was published beside what was measured, where the file holds both."""
    published = file.content["published"]
    if published is None:
        return
    yield f"<h3>{escape(str(published['model']))}: published and measured, in percent</h3>"
    yield paragraph(str(published["source"]), "note")
    rows = []
    for row in published["rows"]:
        figures = " or ".join(f"{figure:g}" for figure in row.get("figures", []))
        errors = row.get("errors", {})
        measured = [f"{name} {with_error(value, errors.get(name))}" for name, value in row.get("measured", {}).items()]
        verdict = row.get("verdict") or ("accepted" if row.get("accepted") else "rejected")
        rows.append([row.get("task", NONE), figures, ", ".join(measured), str(verdict)])
    yield table(["task", "published", "measured", ""], rows, "published")


def _harness(content: dict[str, Any], found: ReportInputs) -> Iterator[list[str]]:
    protocol = content["protocol"]
    sampling = protocol.get("sampling") or {}
    for task, metrics in content["results"].items():
        shots = (protocol.get("shots") or {}).get(task, NONE)
        counts = (content.get("n-samples") or {}).get(task) or {}
        answers = ", ".join(
            f"{name} {sampling[name]}"
            for name in ("preset", "schedule", "block_length", "temperature")
            if sampling.get(name)
        )
        parts = [
            f"{shots} shots",
            f"likelihood {_short(protocol.get('likelihood') or {})}",
            f"answers {answers or 'by default'}",
            str(protocol.get("precision", "precision not known")),
            f"lm_eval {protocol.get('lm_eval', 'not known')}",
        ]
        told = "; ".join(parts)
        for name, value in metrics.items():
            metric, _, way = name.partition(",")
            if metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, int | float) or not way:
                continue
            figure = metric if way == "none" else f"{metric}, {way}"
            error = metrics.get(f"{metric}_stderr,{way}")
            of = counted(counts["effective"], "document") if "effective" in counts else NONE
            yield [found.run_of(protocol.get("checkpoint")), task, figure, with_error(value, error), of, told]


def _demo(name: str, report: dict[str, Any]) -> Iterator[list[str]]:
    """Figures of `make demo`, which gives no standard errors."""
    of = f"{report.get('validation_tokens', 0):,} tokens"
    for key, figure in (("bits_per_byte", "bits per byte"), ("infill_accuracy", "tokens filled in rightly")):
        if isinstance(report.get(key), int | float):
            told = f"make demo, held-out documents; {report.get('bits_per_byte_is', '')}"
            told = told if key == "bits_per_byte" else "make demo, 15 % of the tokens are gaps"
            yield [name, "demo", figure, with_error(report[key], None), of, told]


def _infilling(found: ReportInputs) -> Iterator[str]:
    """Spans by length and writer, of all files that were given."""
    rows: list[tuple[str, str, dict[str, Any]]] = []
    for file in found.of_kind("infill"):
        protocol = file.content.get("protocol") or {}
        rows += [(found.run_of(protocol.get("checkpoint")), file.path.name, row) for row in file.content["rows"]]
    several = len(found.of_kind("infill")) > 1
    names = list(dict.fromkeys((model, name, row["writer"]) for model, name, row in rows))
    pictures = []
    for key, title, unit in (
        ("exact", "Spans that are exactly right", "share"),
        ("bits_per_token", "Cost of what stood there", "bits per token"),
    ):
        series = []
        for model, name, writer in names:
            of = [row for *place, row in rows if place == [model, name] and row["writer"] == writer]
            marks = [_mark(row["length"], row.get(key)) for row in of]
            known = [mark for mark in marks if mark is not None]
            if known:
                series.append(Series(f"{model}: {writer}" if several else writer, known))
        lengths = sorted({mark.x for each in series for mark in each.marks})
        if series:
            chart = Chart(title, series, "tokens of the span", unit, logarithmic=(True, False), ticks=lengths)
            pictures.append(drawn(chart, f"infill-{key}"))
    yield f'<div class="charts">{"".join(pictures)}</div>'
    head = [
        "model",
        "file",
        "writer",
        "length",
        "spans",
        "exact",
        "tokens right",
        "bits a token",
        "still parses",
        "length right",
    ]
    cells = [
        [model, name, row["writer"], row["length"], row["spans"]]
        + [_cell(row.get(key)) for key in ("exact", "token_accuracy", "bits_per_token", "parses", "length_right")]
        for model, name, row in rows
    ]
    yield table(head, cells, "infilling", words=3, caption="± one standard error over spans")


def _reversal(file: ReportedFile) -> Iterator[str]:
    """Right answers of every model and question, or the claims that `--json` printed."""
    rows = file.content.get("rows", [])
    if rows:
        names = list(rows[0])
        caption = (
            f"{file.path.name}: mean over all seeds ± one standard error, also of models that did not learn the facts"
        )
        yield table(names, [[_cell(row[name]) for name in names] for row in rows], "reversal", caption, words=3)
    claims = file.content.get("claims", [])
    if claims:
        words = {True: "holds", False: "fails", None: ""}
        cells = [
            [c["claim"], f"{number(c['value'])} {c['unit']}", c["goal"], words.get(c["holds"], "")] for c in claims
        ]
        yield table(["claim", "measured", "goal", ""], cells, caption=file.path.name)
    if not rows and not claims:
        yield paragraph(f"{file.path.name}: no model has answered yet.", "note")


def _mark(length: int, figure: Any) -> Mark | None:
    """A figure over the length of the span; None where it is not known, or not a number."""
    value = figure.get("value") if isinstance(figure, dict) else figure
    error = figure.get("error") if isinstance(figure, dict) else None
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return Mark(length, value) if error is None else Mark(length, value, value - error, value + error)


def _cell(value: Any) -> str:
    """A figure of a row: with its error, a number alone (said so), or words."""
    if isinstance(value, dict) and "value" in value:
        return with_error(value["value"], value.get("error"))
    if isinstance(value, float):
        return with_error(value, None)
    return NONE if value is None else str(value)
