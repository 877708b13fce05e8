"""A sequence while it is written: in colours on a terminal, and as one page of HTML with a slider over the steps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from llada_megatron.parallel.sampling.sequence_view import Cell, SequenceView

SCALE = ((0.3, "red"), (0.6, "dark_orange"), (0.9, "yellow"), (1.01, "green"))
"""Upper ends of confidence, and the colour below each."""

MASK = "░"

_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


class Screen:
    """A live view of a picture. It clears itself away at the end: the caller prints what is to stay."""

    def __init__(self, console: Console, first: int = 0) -> None:
        """`first`: position from which the picture is shown."""
        self._console, self._first = console, first
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Screen:
        self._live.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.stop()

    def show(self, picture: SequenceView, step: int, status: str) -> None:
        """Draw it; the part that does not fit on the screen is left out, around what this step wrote."""
        width, height = self._console.width, max(3, self._console.height - 4)
        cells = picture.cells[self._first :]
        lines = coloured(cells, step).wrap(self._console, width, no_wrap=False)
        place = _line_of_last(cells, step, width, self._console)
        start = max(0, min(place - height // 2, len(lines) - height))
        shown = Text("\n").join(lines[start : start + height])
        self._live.update(Group(shown, Text(""), Text(status, style="dim")), refresh=True)


def coloured(cells: Sequence[Cell], step: int = -1) -> Text:
    """The cells as text; those that were written in `step` are underlined, masked ones are blocks."""
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


def visible(text: str) -> str:
    """A text whose control characters are shown and not obeyed: a model's output moves no cursor."""
    return text.translate(_CONTROL)


def colour_of(confidence: float) -> str:
    """The colour of a probability."""
    return next(colour for end, colour in SCALE if confidence < end)


def legend() -> Text:
    """What the colours mean."""
    text = Text("probability  ", style="dim")
    low = 0.0
    for end, colour in SCALE:
        text.append(f"{low:.0%}–{min(end, 1.0):.0%} ", style=colour)
        low = end
    return text


def _line_of_last(cells: Sequence[Cell], step: int, width: int, console: Console) -> int:
    """The line of the last cell that this step wrote."""
    last = max((i for i, cell in enumerate(cells) if cell.step == step and step > 0), default=len(cells) - 1)
    return len(coloured(cells[: last + 1]).wrap(console, width)) - 1


_PLACE = "/*DATA*/"


class Recording:
    """The steps of a picture, one after the other."""

    def __init__(self, picture: SequenceView) -> None:
        self._picture = picture
        self._start = [[cell.piece, cell.token, cell.given] for cell in picture.cells]
        self._steps: list[list[list[Any]]] = []

    def add(self, changed: list[int]) -> None:
        """Record what a step changed in the picture."""
        self._steps.append([self._entry(position, self._picture.cells[position]) for position in changed])

    def html(self, facts: dict[str, str]) -> str:
        """The page. `facts` (name, value) stand below the title."""
        data = {"facts": facts, "start": self._start, "steps": self._steps}
        text = json.dumps(data).replace("<", "\\u003c")  # in ASCII, and nothing in it ends the script
        template = resources.files("llada_megatron.launch.sampling").joinpath("page.html").read_text("utf-8")
        return template.replace(_PLACE, text)

    @staticmethod
    def _entry(position: int, cell: Cell) -> list[Any]:
        """Position, text, token (null = masked), probability, step, and whether it lies behind the end of text."""
        confidence = None if cell.confidence is None else round(cell.confidence, 4)
        return [position, cell.piece, cell.token, confidence, cell.step, int(cell.ended)]
