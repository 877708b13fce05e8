"""Texts that models wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from llada_megatron.launch.evaluation.report.figure_text import flat, number
from llada_megatron.launch.evaluation.report.report_inputs import KINDS, ReportInputs
from llada_megatron.pages.document import counted, folded, paragraph, table

_SHOWN, _LONGEST = 8, 2000
"""Texts of a file, and characters of a text."""


@dataclass(frozen=True)
class AskedSamples:
    """Samples that were made for the report with a run's model."""

    run: str
    records: Sequence[dict[str, Any]]
    """As in a file of samples."""
    settings: dict[str, Any]
    failure: str | None = None
    """Why there are none."""


def samples_section(found: ReportInputs, asked: Sequence[AskedSamples]) -> Iterator[str]:
    """Samples of files, and those that were made for this report."""
    yield "<h2>Samples</h2>"
    files = found.of_kind("samples")
    if not files and not asked and not any(run.demo for run in found.runs):
        yield paragraph(
            f"No samples were given ({KINDS['samples']} writes them), and none were asked for (--prompt TEXT).", "note"
        )
        return
    for each in asked:
        if each.failure is None:
            yield from _texts(f"{each.run}, for this report", each.records, each.settings)
        else:
            yield f"<h3>{escape(each.run)}, for this report</h3>" + paragraph(f"There are none: {each.failure}", "note")
    for file in files:
        yield from _texts(file.path.name, file.content, _settings(file.path))
    for run in found.runs:
        if run.demo:
            yield from _demo(run.name, run.demo)


def _settings(path: Path) -> dict[str, Any]:
    """What a batch's results depend on, which `llada sample --output` writes beside them."""
    try:
        content = json.loads(path.with_name(path.name + ".run.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    request = content.get("request") if isinstance(content, dict) else None
    return request if isinstance(request, dict) else {}


def _texts(title: str, records: Sequence[dict[str, Any]], settings: dict[str, Any]) -> Iterator[str]:
    yield f"<h3>{escape(title)}</h3>"
    tokens, forwards = (sum(each.get(key) or 0 for each in records) for key in ("new_tokens", "forwards"))
    ended = sum(bool(each.get("ended")) for each in records)
    rate = number(tokens / forwards, 3) if forwards else "not known"
    yield paragraph(
        f"{counted(len(records), 'text')}, {min(_SHOWN, len(records))} of them shown: {counted(tokens, 'token')} in "
        f"{forwards:,} forward passes, {rate} a pass; {ended:,} were ended by the model.",
        "note",
    )
    if settings:
        yield folded("How they were made", table(["setting", "value"], flat(settings), words=2))
    else:
        yield paragraph("How they were made is not in the file.", "note")
    cards = "".join(_card(record) for record in records[:_SHOWN])
    yield f'<div class="cards">{cards}</div>'


def _card(record: dict[str, Any]) -> str:
    text, new = record.get("text"), record.get("new")
    if text is None:  # a checkpoint without a tokenizer
        shown = escape(" ".join(map(str, record.get("tokens", [])))[:_LONGEST])
    elif new and text.endswith(new):
        given = text[: len(text) - len(new)]
        shown = f"{escape(_cut(given, end=True))}<mark>{escape(_cut(new))}</mark>"
    else:
        shown = escape(_cut(text)) + (f"\n\nwritten: <mark>{escape(_cut(new))}</mark>" if new else "")
    passes = f"{record.get('new_tokens', '?')} tokens in {record.get('forwards', '?')} passes"
    told = paragraph(f"text {record['number']}: {passes}", "note")
    return f'<div class="card">{told}<pre>{shown}</pre></div>'


def _cut(text: str, end: bool = False) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"[cut] {text[-_LONGEST:]}" if end else f"{text[:_LONGEST]} [cut]"


def _demo(name: str, report: dict[str, Any]) -> Iterator[str]:
    examples = [each for each in report.get("examples", []) if isinstance(each, dict)]
    if examples:
        yield f"<h3>{escape(name)}: gaps of held-out text, of make demo</h3>"
        cards = "".join(
            f'<div class="card"><p class="note">before</p><pre>{escape(_cut(str(each.get("before"))))}</pre>'
            f'<p class="note">after</p><pre>{escape(_cut(str(each.get("after"))))}</pre></div>'
            for each in examples[:_SHOWN]
        )
        yield f'<div class="cards">{cards}</div>'
