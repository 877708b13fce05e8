"""Spans of held-out text that a model is to fill in, and what became of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llada_megatron.llada_moe.evaluation.mean_error import mean_with_error
from llada_megatron.llada_moe.sampling import draws


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
    """Shares of spans that are right as a whole, of tokens that are right, and of texts that still parse.

    Each with its standard error over spans. A filling of another length than the span's is compared from its beginning.
    """
    exact = [each.written == each.span.truth for each in filled]
    tokens = [
        sum(a == b for a, b in zip(each.written, each.span.truth, strict=False)) / len(each.span.truth)
        for each in filled
    ]
    lengths = [len(each.written) == len(each.span.truth) for each in filled]
    asked = [each.parses for each in filled if each.parses is not None]
    return {
        "spans": len(filled),
        "exact": mean_with_error(exact),
        "token_accuracy": mean_with_error(tokens),
        "length_right": mean_with_error(lengths),
        "parses": mean_with_error(asked) if asked else None,
        "parsed": len(asked),
    }
