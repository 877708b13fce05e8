"""The result of a prompt, and the text of single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llada_megatron.llada_moe.data.tokenizer import Tokenizer

_CONTEXT = 4
"""Preceding tokens that are decoded together with a token, since some tokenizers write a space only between two."""

_UNFINISHED = "\ufffd"
"""What the decoder gives for an incomplete character."""


def text_after(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that `ids` add when they follow the ids `before`."""
    context = list(before[-_CONTEXT:])
    known, whole = tokenizer.decode(context), tokenizer.decode([*context, *ids])
    return whole[len(known) :] if whole.startswith(known) else tokenizer.decode(list(ids))


def token_pieces(tokenizer: Tokenizer, ids: Sequence[int | None]) -> list[str | None]:
    """The text of each token of a sequence; None where the token is None (masked).

    A character of several tokens is the text of the last one, once all of them are there; the others have none.
    """
    pieces: list[str | None] = []
    start = 0
    """First position whose text is not given out yet."""
    for i, token in enumerate(ids):
        if token is None:
            pieces.append(None)
            start = i + 1
            continue
        before = [known for known in ids[max(0, start - _CONTEXT) : start] if known is not None]
        text = text_after(tokenizer, before, [known for known in ids[start : i + 1] if known is not None])
        last = i + 1 == len(ids) or ids[i + 1] is None
        if text.endswith(_UNFINISHED) and not last and i + 1 - start < _CONTEXT:
            pieces.append("")
            continue
        pieces.append(text)
        start = i + 1
    return pieces


@dataclass(frozen=True)
class Result:
    """One finished sequence, up to the first end-of-text token that was sampled, which is not included."""

    number: int
    """Number of the prompt, from 1."""
    id: Any
    """The user's name for the prompt."""
    text: str | None
    """The whole text; None without a tokenizer."""
    new: str | None
    """What was sampled: the continuation, or the fillings of gaps joined by newlines."""
    tokens: list[int]
    """Token ids of the whole sequence."""
    written: list[list[int]]
    """The sampled tokens of each gap; a continuation counts as one gap."""
    ended: bool
    """Whether the model ended the text."""
    forwards: int
    """Forward passes that the sequence took part in."""
    positions: int
    """Positions that were run for it, over all these passes."""
    seconds: float
    """Time from its first pass to its last."""

    @property
    def new_tokens(self) -> int:
        """How many tokens were sampled."""
        return sum(map(len, self.written))

    @property
    def tokens_per_forward(self) -> float:
        """Sampled tokens per forward pass."""
        return self.new_tokens / max(1, self.forwards)

    def record(self) -> dict[str, Any]:
        """The JSON object of the result."""
        name = {} if self.id is None else {"id": self.id}
        return {
            "number": self.number,
            **name,
            "text": self.text,
            "new": self.new,
            "tokens": self.tokens,
            "written": self.written,
            "new_tokens": self.new_tokens,
            "ended": self.ended,
            "forwards": self.forwards,
            "positions": self.positions,
            "seconds": round(self.seconds, 4),
        }

    @classmethod
    def of(cls, record: dict[str, Any]) -> Result:
        """The result that a `record` stands for. Raises KeyError if a key is missing."""
        fields = ("number", "text", "new", "tokens", "written", "ended", "forwards", "positions", "seconds")
        return cls(id=record.get("id"), **{field: record[field] for field in fields})
