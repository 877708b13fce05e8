"""The plan as one HTML file that needs nothing else: memory of each stage, the pipeline's timeline, time by part."""

from __future__ import annotations

from html import escape

from llada_megatron.llada_moe.planning.estimate import GIB, Estimate
from llada_megatron.llada_moe.planning.timeline import Slot, one_forward_one_backward
from llada_megatron.pages.document import document
from llada_megatron.tools.plan.report import report

WIDTH, ROW = 760, 22
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#e45756", "#72b7b2", "#b279a2", "#eeca3b", "#9d755d", "#bab0ac", "#ff9da6")
MOST_DRAWN = 12
"""Micro-batches of the timeline: more only repeat its middle."""


def page(estimate: Estimate) -> str:
    """The whole page."""
    title = f"llada plan: {estimate.run.layout.world_size} x {estimate.gpu.name}"
    sections = [
        ("Memory of a rank, by pipeline stage", memory_picture(estimate)),
        ("Timeline of the pipeline", timeline_picture(estimate)),
        ("Time of a step, by part", time_picture(estimate)),
        ("Report", f"<pre>{escape(report(estimate))}</pre>"),
    ]
    body = "\n".join(f"<section><h2>{escape(name)}</h2>\n{content}</section>" for name, content in sections)
    return document(title, [f"<h1>{escape(title)}</h1>", body], "body{max-width:60em}")


def memory_picture(estimate: Estimate) -> str:
    """A bar for each stage, its parts one after another; the line is the end of the card."""
    card = estimate.gpu.memory_gib * GIB
    scale = (WIDTH - 80) / max(card, *(stage.allocated for stage in estimate.stages))
    names = [name for name in estimate.stages[0].parts if any(stage.parts[name] > 0 for stage in estimate.stages)]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    drawn = []
    for row, stage in enumerate(estimate.stages):
        left = 80.0
        drawn.append(_text(0, row * ROW + 15, f"stage {stage.stage}"))
        for name in names:
            size = stage.parts[name]
            label = f"{name}: {size / GIB:.2f} GiB"
            drawn.append(_box(left, row * ROW, size * scale, colours[name], label))
            left += size * scale
    end, height = 80 + card * scale, len(estimate.stages) * ROW
    drawn.append(f'<line x1="{end:.1f}" x2="{end:.1f}" y1="0" y2="{height}" stroke="currentColor" stroke-width="2"/>')
    sums = ", ".join(f"stage {stage.stage} {stage.allocated / GIB:.1f}" for stage in estimate.stages)
    note = f"Line across: the {estimate.gpu.memory_gib:g} GiB of a card. Allocated, in GiB: {sums}"
    beside = f"{estimate.card_bytes / GIB:.1f} with what the allocator, CUDA and NCCL keep beside the fullest"
    return _svg(drawn, height) + legend(colours) + f"<p>{note}; {beside}.</p>"


def timeline_picture(estimate: Estimate) -> str:
    """Forward and backward passes of each stage, one row a stage."""
    layout = estimate.run.layout
    if layout.pipeline_parallel == 1:
        return "<p>One stage: no pipeline.</p>"
    count = min(MOST_DRAWN, estimate.workload.micro_batches)
    slots = one_forward_one_backward(estimate.time.stages, count)
    scale = (WIDTH - 80) / max(slot.end for slot in slots)
    drawn = [_text(0, stage * ROW + 15, f"stage {stage}") for stage in range(layout.pipeline_parallel)]
    drawn += [_slot(slot, scale) for slot in slots]
    note = f"{count} of {estimate.workload.micro_batches} micro-batches"
    if layout.pipeline_chunks_per_rank > 1:
        note += f", drawn without the {layout.pipeline_chunks_per_rank} chunks of a rank, which divide the idle ends"
    colours = {"forward": COLOURS[0], "backward": COLOURS[1]}
    return _svg(drawn, layout.pipeline_parallel * ROW) + legend(colours) + f"<p>{note}.</p>"


def time_picture(estimate: Estimate) -> str:
    """A bar for each part of the step."""
    parts = sorted(estimate.time.parts.items(), key=lambda part: -part[1])
    scale = (WIDTH - 260) / parts[0][1]
    drawn = []
    for row, (name, seconds) in enumerate(parts):
        share = seconds / estimate.time.total
        drawn.append(_text(0, row * ROW + 15, name))
        drawn.append(_box(140, row * ROW, seconds * scale, COLOURS[0], f"{name}: {seconds:.3f} s"))
        drawn.append(_text(145 + seconds * scale, row * ROW + 15, f"{seconds:.3f} s, {share:.0%}"))
    return _svg(drawn, len(parts) * ROW)


def legend(colours: dict[str, str]) -> str:
    """What each colour stands for."""
    return (
        "<p>"
        + " ".join(f'<span style="color:{colour}">&#9632;</span> {escape(name)}' for name, colour in colours.items())
        + "</p>"
    )


def _slot(slot: Slot, scale: float) -> str:
    label = f"{'forward' if slot.forward else 'backward'} {slot.micro_batch}"
    colour = COLOURS[0] if slot.forward else COLOURS[1]
    return _box(80 + slot.start * scale, slot.stage * ROW, (slot.end - slot.start) * scale, colour, label)


def _svg(drawn: list[str], height: int) -> str:
    inside = "\n".join(drawn)
    return f'<svg viewBox="0 0 {WIDTH} {height + 4}" width="{WIDTH}" role="img">\n{inside}\n</svg>'


def _box(left: float, top: float, width: float, colour: str, label: str) -> str:
    return (
        f'<rect x="{left:.1f}" y="{top + 2:.1f}" width="{max(width, 0):.1f}" height="{ROW - 4}" fill="{colour}" '
        f'stroke="var(--paper)" stroke-width="0.5"><title>{escape(label)}</title></rect>'
    )


def _text(left: float, base: float, text: str) -> str:
    return f'<text x="{left:.1f}" y="{base:.1f}">{escape(text)}</text>'
