"""What a display of a sequence shows while it is sampled: token, text and confidence of each position."""

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
    """The present state of one position."""

    given: bool
    """Whether the token is part of the prompt."""
    token: int | None
    """None = masked."""
    piece: str
    """The text of the token; empty while it is masked."""
    confidence: float | None = None
    """Probability that the model gave the token when it was sampled."""
    step: int = 0
    """Step in which the position was sampled or masked again, from 1; 0 = unchanged since the start."""
    ended: bool = False
    """Whether the position lies after an end of text."""


@dataclass
class SequenceView:
    """The cells of one sequence, which `apply` brings up to date step by step."""

    tokenizer: Tokenizer | None
    cells: list[Cell]
    names: dict[int, str] = field(default_factory=dict)
    """Names to be shown for tokens without a text."""

    @classmethod
    def of(cls, request: Request, tokenizer: Tokenizer | None) -> SequenceView:
        """The view of a sequence before its first step."""
        length = request.length or len(request.tokens)
        pairs = list(zip(request.tokens, request.gaps, strict=True))[:length]
        cells = [Cell(not gap, None if gap else token, "") for token, gap in pairs]
        names = {} if tokenizer is None else {i: name for name, i in tokenizer.special_ids.items()}
        view = cls(tokenizer, cells, names)
        view._update_pieces()
        return view

    def apply(self, step: SampledStep) -> list[int]:
        """Apply a step; returns the positions whose cells changed."""
        changed = {one.position for one in step.written}
        for one in step.written:
            cell = self.cells[one.position]
            cell.token, cell.confidence, cell.step = one.token, one.confidence, step.number
        for result in step.finished:
            for position in range(len(result.tokens) + result.ended, len(self.cells)):
                self.cells[position].ended = True
                changed.add(position)
        return sorted(changed | self._update_pieces())

    @property
    def masked(self) -> int:
        """How many positions are still masked."""
        return sum(cell.token is None and not cell.ended for cell in self.cells)

    @property
    def written(self) -> int:
        """How many positions hold a sampled token."""
        return sum(not cell.given and cell.token is not None and not cell.ended for cell in self.cells)

    def _update_pieces(self) -> set[int]:
        """Update the text of all cells; returns the positions where it changed.

        A token may change the text of its neighbours, when they make up one character together.
        """
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
