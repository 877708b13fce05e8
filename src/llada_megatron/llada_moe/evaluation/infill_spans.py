"""Spans of held-out text that a model is to fill in, and what became of them."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llada_megatron.llada_moe.sampling import draws

LENGTHS = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class InfillSpan:
    """The tokens [start, stop) of a text, which are taken out of it."""

    text: tuple[int, ...]
    start: int
    stop: int
    number: int
    """Among all spans; draws depend on it."""

    @property
    def truth(self) -> tuple[int, ...]:
        """What stood there."""
        return self.text[self.start : self.stop]

    @property
    def before(self) -> tuple[int, ...]:
        """The text before it."""
        return self.text[: self.start]

    @property
    def after(self) -> tuple[int, ...]:
        """The text behind it."""
        return self.text[self.stop :]


def choose_infill_spans(
    texts: Sequence[Sequence[int]], lengths: Sequence[int], each: int, seed: int
) -> list[InfillSpan]:
    """`each` spans of every length, the same for every model; fewer where no text is long enough.

    A text gives at most one span of a length, and the span leaves at least as many tokens on either side.
    """
    found: list[InfillSpan] = []
    for length in lengths:
        usable = [i for i, text in enumerate(texts) if len(text) >= 3 * length]
        order = draws.uniform(seed, draws.GAP, torch.tensor(-length), torch.arange(len(usable))).argsort().tolist()
        for at in order[:each]:
            text = tuple(texts[usable[at]])
            room = len(text) - 3 * length + 1
            share = float(draws.uniform(seed, draws.GAP, torch.tensor(-length), torch.tensor(-1 - usable[at])))
            start = length + min(room - 1, int(share * room))
            found.append(InfillSpan(text, start, start + length, len(found)))
    return found


@dataclass(frozen=True)
class Filled:
    """What a model, or a baseline, wrote in the place of one span."""

    span: InfillSpan
    written: tuple[int, ...]
    parses: bool | None = None
    """Whether the text with it is still valid syntax; None where nobody asked, or the original is not."""


def infill_figures(filled: Sequence[Filled]) -> dict[str, Any]:
    """Shares of spans that are right as a whole, and of tokens, of fillings of the spans' own length."""
    exact = [each.written == each.span.truth for each in filled]
    pairs = [pair for each in filled for pair in zip(each.written, each.span.truth, strict=False)]
    asked = [each.parses for each in filled if each.parses is not None]
    return {
        "spans": len(filled),
        "exact": share_with_error(exact),
        "token_accuracy": sum(a == b for a, b in pairs) / max(1, sum(len(each.span.truth) for each in filled)),
        "parses": share_with_error(asked) if asked else None,
    }


def share_with_error(right: Sequence[bool]) -> dict[str, float | None]:
    """A share, and its standard error over what it is a share of."""
    share = sum(right) / max(1, len(right))
    error = math.sqrt(share * (1 - share) / (len(right) - 1)) if len(right) > 1 else None
    return {"value": share, "error": error}


def is_python(text: str) -> bool:
    """Whether a text is valid Python syntax. It is parsed, and never run."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
