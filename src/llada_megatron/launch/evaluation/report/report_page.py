"""The whole page of a report."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from html import escape

from llada_megatron import __version__
from llada_megatron.launch.evaluation.report.expert_section import experts_section
from llada_megatron.launch.evaluation.report.report_inputs import KINDS, MALFORMED, ReportInputs, malformed
from llada_megatron.launch.evaluation.report.sample_section import AskedSamples, samples_section
from llada_megatron.launch.evaluation.report.sampler_section import samplers_section
from llada_megatron.launch.evaluation.report.task_section import tasks_section
from llada_megatron.launch.evaluation.report.training_section import bounds_section, losses_section, runs_section
from llada_megatron.pages.document import counted, document, folded, paragraph, table

_STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 0 1.5rem }
.chart > svg { width: 100% } .chart { margin: .6em 0 } .key { display: inline-block; margin-right: .8em }
.cards { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }
.card { border: 1px solid var(--line); border-radius: .4rem; padding: .2rem .8rem; min-width: 0 }
.card pre { max-height: 24em; overflow: auto }
#tasks :is(th, td):last-child { text-align: left; white-space: normal; min-width: 18em }
"""


def report_page(title: str, found: ReportInputs, asked: Sequence[AskedSamples] = ()) -> str:
    """The page as HTML. `asked`: samples that were made for it.

    Raises:
        DataError: a run's folder, or a file, whose content has not the form that its command writes.
    """
    try:
        return document(title, _body(title, found, asked), _STYLE)
    except MALFORMED:
        _refuse_malformed(found)
        raise


def _refuse_malformed(found: ReportInputs) -> None:
    """Name the first input that a page cannot be made of, each by itself. Raises DataError."""
    parts = [(run.path, ReportInputs(runs=[run])) for run in found.runs]
    parts += [(file.path, ReportInputs(files=[file])) for file in found.files]
    for path, part in parts:
        try:
            "".join(_body("", part, ()))
        except MALFORMED as error:
            raise malformed(path, error) from error


def _body(title: str, found: ReportInputs, asked: Sequence[AskedSamples]) -> Iterator[str]:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    yield f"<main><h1>{escape(title)}</h1>"
    what = f"{counted(len(found.runs), 'run')} and {counted(len(found.files), 'file')} of results"
    yield paragraph(f"{what}; {now}, llada {__version__}.", "note")
    yield from runs_section(found.runs)
    yield from losses_section(found.runs)
    yield from bounds_section(found.runs)
    yield from tasks_section(found)
    yield from samples_section(found, asked)
    yield from samplers_section(found)
    yield from experts_section(found)
    rows = [[str(run.path), "a run's folder"] for run in found.runs]
    rows += [[str(file.path), f"{file.kind} ({KINDS[file.kind]})"] for file in found.files]
    yield "<h2>Sources</h2>" + folded("What this page was made from", table(["path", "what it is"], rows, words=2))
    yield "</main>"
