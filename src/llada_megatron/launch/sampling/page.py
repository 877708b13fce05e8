"""One self-contained page of HTML with a slider over the steps of a sequence."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from llada_megatron.launch.sampling.display import Cell, SequenceView

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
