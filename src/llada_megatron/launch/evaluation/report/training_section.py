"""What the runs are, their losses, and the bounds of their text's cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from llada_megatron.launch.evaluation.report.figure_text import NONE, number
from llada_megatron.launch.evaluation.report.report_inputs import ReportedRun
from llada_megatron.launch.evaluation.report.run_curves import Curve
from llada_megatron.pages.charts import Chart, Mark, Series, drawn
from llada_megatron.pages.document import counted, folded, items, paragraph, table

_SHOWN = 12
"""Values of a curve that its table shows."""
_LOSSES = (
    ("loss", "Training loss", "nats per token", (False, False)),
    ("learning_rate", "Learning rate", "learning rate", (False, False)),
    ("grad_norm", "Norm of the gradient", "norm", (False, True)),
)
_BOUNDS = (
    ("validation/bits_per_byte", "Held-out text", "bits per byte", (False, False)),
    ("validation/loss", "Held-out text, of objectives whose loss is no bound", "nats per token", (False, False)),
    ("bits_per_byte", "Training text", "bits per byte", (False, False)),
)


def runs_section(runs: Sequence[ReportedRun]) -> Iterator[str]:
    """A table of what was trained, and how far."""
    yield "<h2>Runs</h2>"
    if not runs:
        yield paragraph("No run's folder was given: the report shows files of results alone.", "note")
        return
    head = ["run", "model", "layers × width", "experts", "objective", "steps", "tokens", "precision", "ranks"]
    yield table(head, [_what(run) for run in runs], "runs", words=5)
    yield items(told for run in runs for told in _troubles(run))


def losses_section(runs: Sequence[ReportedRun]) -> Iterator[str]:
    """The training curves."""
    yield "<h2>Losses</h2>"
    yield from _curves(runs, _LOSSES, "training")


def bounds_section(runs: Sequence[ReportedRun]) -> Iterator[str]:
    """Validation, bits per byte, and the loss by mask ratio."""
    yield "<h2>Bounds</h2>"
    yield paragraph(
        "Bits per byte are an upper bound of the text's cost for diffusion models, and exact for autoregressive ones: "
        + "; ".join(f"{run.name}: {_objective(run)}" for run in runs),
        "note",
    )
    yield from _curves(runs, _BOUNDS, "validation or bits per byte")
    yield from _by_mask_ratio(runs)


def _what(run: ReportedRun) -> list[str]:
    model, training = _part(run, "model"), _part(run, "training")
    layout, moe = _part(run, "layout"), _part(_part(run, "model"), "moe")
    step = max((curve.last[0] for curve in run.curves.curves.values() if curve.last), default=None)
    sequences = run.curves.last.get("consumed_sequences")
    length = training.get("sequence_length")
    tokens = sequences * length if isinstance(sequences, int) and isinstance(length, int) else None
    return [
        run.name,
        str(model.get("family", NONE)),
        f"{model.get('num_layers', NONE)} × {model.get('hidden_size', NONE)}",
        f"{moe['num_experts']}, {moe.get('top_k')} a token" if moe.get("num_experts") else "dense",
        _objective(run),
        f"{number(step)} of {number(training.get('steps'))}",
        number(tokens),
        str(training.get("precision", NONE)),
        " × ".join(f"{name.removesuffix('_parallel')} {size}" for name, size in layout.items() if _spread(name, size))
        or "1",
    ]


def _spread(name: str, size: Any) -> bool:
    return name.endswith("_parallel") and isinstance(size, int) and not isinstance(size, bool) and size > 1


def _objective(run: ReportedRun) -> str:
    kind = _part(run, "objective").get("kind")
    return str(kind) if kind else "diffusion" if run.config else "objective not known"


def _part(holder: ReportedRun | dict[str, Any], name: str) -> dict[str, Any]:
    part = (holder.config if isinstance(holder, ReportedRun) else holder).get(name)
    return part if isinstance(part, dict) else {}


def _troubles(run: ReportedRun) -> Iterator[str]:
    """What is missing of a run, or went wrong in it."""
    curves = run.curves
    if not run.config:
        yield f"{run.name}: there is no config.yaml; what was trained is not known"
    if not curves.lines:
        yield f"{run.name}: there is no metrics.jsonl, or nothing in it; its curves are missing"
    if curves.broken:
        yield f"{run.name}: {counted(curves.broken, 'broken line')} of metrics.jsonl left out"
    if curves.skipped:
        yield f"{run.name}: {counted(curves.skipped, 'step')} left out by the recovery policy"
    for name, curve in curves.curves.items():
        if curve.missing_count:
            yield (
                f"{run.name}: {name} is not a number in {counted(curve.missing_count, 'line')}, first at step "
                f"{curve.missing[0]:,} (crosses in the picture)"
            )


def _curves(
    runs: Sequence[ReportedRun], shown: Sequence[tuple[str, str, str, tuple[bool, bool]]], what: str
) -> Iterator[str]:
    pictures, rows, values = [], [], []
    for key, title, unit, logarithmic in shown:
        found = [(run.name, run.curves.curves[key]) for run in runs]
        found = [(name, curve) for name, curve in found if curve.values or curve.missing_count]
        if not found:
            continue
        series = [Series(name, curve.marks, curve.missing) for name, curve in found]
        chart = Chart(title, series, "step", unit, logarithmic=logarithmic)
        pictures.append(drawn(chart, f"curve-{key.replace('/', '-')}"))
        rows += [_summary(title, name, curve) for name, curve in found]
        values += [(title, name, *each) for name, curve in found for each in _thinned(curve.marks)]
    if not pictures:
        yield paragraph(f"No run that was given wrote down any figure of {what}.", "note")
        return
    yield f'<div class="charts">{"".join(pictures)}</div>'
    lines = [curve.group for run in runs for key, *_ in shown if (curve := run.curves.curves[key]).group > 1]
    if lines:
        yield paragraph(
            f"Long curves are drawn by groups of up to {max(lines):,} values: the line is their mean, and the band "
            "goes from the least to the greatest.",
            "note",
        )
    head = ["figure", "run", "first", "least", "last", "values", "not a number"]
    yield table(head, rows, f"summary-{what.split()[0]}", words=2)
    inside = table(["figure", "run", "step", "value"], values, words=2)
    yield folded(f"Values of these pictures, {_SHOWN} of each line", inside)


def _summary(title: str, name: str, curve: Curve) -> list[str]:
    def at(found: tuple[int, float] | None) -> str:
        return NONE if found is None else f"{number(found[1])} (step {found[0]:,})"

    return [
        title,
        name,
        *map(at, (curve.first, curve.least, curve.last)),
        f"{curve.values:,}",
        str(curve.missing_count),
    ]


def _thinned(marks: Sequence[Mark]) -> list[tuple[str, str]]:
    """Evenly spaced points, the first and the last among them."""
    last = len(marks) - 1
    chosen = sorted({round(last * i / (_SHOWN - 1)) for i in range(_SHOWN)}) if last > 0 else range(len(marks))
    return [(f"{marks[i].x:,.0f}", number(marks[i].y)) for i in chosen]


def _by_mask_ratio(runs: Sequence[ReportedRun]) -> Iterator[str]:
    yield "<h3>Loss by mask ratio</h3>"
    known = [run for run in runs if any(value is not None for value in run.curves.by_mask_ratio.values())]
    if not known:
        yield paragraph("No run that was given reports its loss by mask ratio.", "note")
        return
    series = [
        Series(run.name, [Mark(_middle(name), value) for name, value in _bins(run) if value is not None])
        for run in known
    ]
    chart = Chart("Training loss by mask ratio, last interval that was reported", series, "mask ratio", "nats")
    yield f'<div class="charts">{drawn(chart, "mask-ratio")}</div>'
    names = sorted({name for run in known for name in run.curves.by_mask_ratio}, key=_middle)
    rows = [[name, *(number(run.curves.by_mask_ratio.get(name)) for run in known)] for name in names]
    yield table(["mask ratio", *(f"{run.name}, step {run.curves.by_mask_ratio_step:,}" for run in known)], rows)


def _bins(run: ReportedRun) -> list[tuple[str, float | None]]:
    return sorted(run.curves.by_mask_ratio.items(), key=lambda each: _middle(each[0]))


def _middle(name: str) -> float:
    """Of a bin's name such as `0.1-0.2`."""
    low, _, high = name.partition("-")
    return (float(low) + float(high)) / 2
