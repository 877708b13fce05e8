"""A sequence while it is written: its cells, and their colours on a terminal."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llada_megatron.parallel.sampling.results import token_pieces

if TYPE_CHECKING:
    from llada_megatron.llada_moe.data.tokenizer import Tokenizer
    from llada_megatron.llada_moe.sampling.token_buffer import Request
    from llada_megatron.parallel.sampling.sampler import SampledStep
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text


@dataclass
class Cell:
    """One position as it is now."""

    given: bool
    token: int | None
    """None = masked."""
    piece: str
    """What is shown of it; empty where it is masked."""
    confidence: float | None = None
    """Probability that the model gave the token when it was written."""
    step: int = 0
    """In which it was written or masked, from 1; 0 = from the start."""
    ended: bool = False
    """It lies behind an end of text."""


@dataclass
class SequenceView:
    """The cells of one sequence; changes of each step are reported once."""

    tokenizer: Tokenizer | None
    cells: list[Cell]
    names: dict[int, str] = field(default_factory=dict)
    """Of tokens without a text."""

    @classmethod
    def of(cls, draft: Request, tokenizer: Tokenizer | None) -> SequenceView:
        """Before the first step."""
        length = draft.length or len(draft.tokens)
        pairs = list(zip(draft.tokens, draft.gaps, strict=True))[:length]
        cells = [Cell(not gap, None if gap else token, "") for token, gap in pairs]
        names = {} if tokenizer is None else {i: name for name, i in tokenizer.special_ids.items()}
        picture = cls(tokenizer, cells, names)
        picture._say_pieces()
        return picture

    def apply(self, step: SampledStep) -> list[int]:
        """Take a step over; returns the positions whose cells are not what they were."""
        changed = {one.position for one in step.written}
        for one in step.written:
            cell = self.cells[one.position]
            cell.token, cell.confidence, cell.step = one.token, one.confidence, step.number
        for result in step.finished:
            for position in range(len(result.tokens) + result.ended, len(self.cells)):
                self.cells[position].ended = True
                changed.add(position)
        return sorted(changed | self._say_pieces())

    @property
    def masked(self) -> int:
        """Positions that are still to be written."""
        return sum(cell.token is None and not cell.ended for cell in self.cells)

    @property
    def written(self) -> int:
        """Positions that are."""
        return sum(not cell.given and cell.token is not None and not cell.ended for cell in self.cells)

    def _say_pieces(self) -> set[int]:
        """Bring the pieces up to date; returns where they changed (a character of several tokens changes them all)."""
        tokens = [cell.token for cell in self.cells]
        if self.tokenizer is None:
            pieces = [None if token is None else f"{token} " for token in tokens]
        else:
            pieces = token_pieces(self.tokenizer, tokens)
        changed = set()
        for position, (cell, piece) in enumerate(zip(self.cells, pieces, strict=True)):
            if not piece and cell.token is not None:
                piece = self.names.get(cell.token, "")
            if cell.piece != (piece or ""):
                cell.piece = piece or ""
                changed.add(position)
        return changed


SCALE = ((0.3, "red"), (0.6, "dark_orange"), (0.9, "yellow"), (1.01, "green"))
"""Upper ends of confidence, and the colour below each."""

MASK = "░"

_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}

_CONTROL |= dict.fromkeys(range(0x80, 0xA0), "\ufffd")
"""Control characters (also those of eight bits) as pictures of themselves."""


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
