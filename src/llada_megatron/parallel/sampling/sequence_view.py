"""One sequence while it is written, position by position, for whoever shows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llada_megatron.parallel.sampling.results import token_pieces

if TYPE_CHECKING:
    from llada_megatron.llada_moe.data.tokenizer import Tokenizer
    from llada_megatron.llada_moe.sampling.token_buffer import Request
    from llada_megatron.parallel.sampling.sampler import SampledStep


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
