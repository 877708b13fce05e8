"""A sequence while it is written: in colours on a terminal, and as one page of HTML with a slider over the steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from llada_megatron.console import visible
from llada_megatron.parallel.sampling.sequence_view import Cell, SequenceView

SCALE = ((0.3, "red"), (0.6, "dark_orange"), (0.9, "yellow"), (1.01, "green"))
"""Upper bounds of the confidence, and the colour below each bound."""

MASK = "░"


class Screen:
    """Shows a sequence live on a terminal. It clears itself at the end; the caller prints what is to stay."""

    def __init__(self, console: Console, first: int = 0) -> None:
        """`first`: the first position that is shown."""
        self._console, self._first = console, first
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def show(self, view: SequenceView, step: int, status: str) -> None:
        """Draw a sequence after a step; if it does not fit on the screen, only the part around the step's tokens."""
        width, height = self._console.width, max(3, self._console.height - 4)
        cells = view.cells[self._first :]
        lines = coloured(cells, step).wrap(self._console, width, no_wrap=False)
        line = _line_of_last(cells, step, width, self._console)
        start = max(0, min(line - height // 2, len(lines) - height))
        shown = Text("\n").join(lines[start : start + height])
        self._live.update(Group(shown, Text(""), Text(status, style="dim")), refresh=True)


def coloured(cells: Sequence[Cell], step: int = -1) -> Text:
    """The cells as coloured text. Tokens that were sampled in `step` are underlined, and masks are grey boxes."""
    text = Text()
    for cell in cells:
        if cell.ended:
            continue
        if cell.token is None:
            text.append(MASK, style="dim")
        elif cell.given or cell.confidence is None:
            text.append(visible(cell.piece))
        else:
            text.append(
                visible(cell.piece),
                style=colour_of(cell.confidence) + (" underline bold" if cell.step == step else ""),
            )
    return text


def colour_of(confidence: float) -> str:
    """The colour for a probability."""
    return next(colour for end, colour in SCALE if confidence < end)


def legend() -> Text:
    """A line that explains the colours."""
    text = Text("probability  ", style="dim")
    low = 0.0
    for end, colour in SCALE:
        text.append(f"{low:.0%}–{min(end, 1.0):.0%} ", style=colour)
        low = end
    return text


def _line_of_last(cells: Sequence[Cell], step: int, width: int, console: Console) -> int:
    """The line of the last cell that was sampled in `step`; the last line if there is none."""
    last = max((i for i, cell in enumerate(cells) if cell.step == step and step > 0), default=len(cells) - 1)
    return len(coloured(cells[: last + 1]).wrap(console, width)) - 1


_DATA_MARK = "/*DATA*/"


class Recording:
    """The steps of a sequence, recorded for one self-contained page of HTML."""

    def __init__(self, view: SequenceView) -> None:
        self._view = view
        self._start = [[cell.piece, cell.token, cell.given] for cell in view.cells]
        self._steps: list[list[list[Any]]] = []

    def add(self, changed: list[int]) -> None:
        """Record a step: the positions that it changed in the view."""
        self._steps.append([self._entry(position, self._view.cells[position]) for position in changed])

    def html(self, properties: dict[str, str]) -> str:
        """The page. The `properties` (name -> value) are shown below its title."""
        data = {"properties": properties, "start": self._start, "steps": self._steps}
        text = json.dumps(data).replace("<", "\\u003c")  # ASCII, and no </script> that would end the script
        template = resources.files("llada_megatron.launch.sampling").joinpath("page.html").read_text("utf-8")
        return template.replace(_DATA_MARK, text)

    @staticmethod
    def _entry(position: int, cell: Cell) -> list[Any]:
        """Position, text, token (null = masked), probability, step, and whether it lies after the end of the text."""
        confidence = None if cell.confidence is None else round(cell.confidence, 4)
        return [position, cell.piece, cell.token, confidence, cell.step, int(cell.ended)]
