"""What became of a prompt, and the text of single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llada_megatron.llada_moe.data.tokenizer import Tokenizer

_CONTEXT = 4
"""Tokens before a piece that are decoded with it: some tokenizers write a space only between two tokens."""

_UNFINISHED = "\ufffd"


def text_after(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text of `ids` where they stand behind `before`."""
    context = list(before[-_CONTEXT:])
    known, whole = tokenizer.decode(context), tokenizer.decode([*context, *ids])
    return whole[len(known) :] if whole.startswith(known) else tokenizer.decode(list(ids))


def token_pieces(tokenizer: Tokenizer, ids: Sequence[int | None]) -> list[str | None]:
    """The piece of each token; None where there is none yet.

    A character of several tokens is the piece of its last one, if all of them are there.
    """
    pieces: list[str | None] = []
    start = 0
    """Tokens from here on have not said their text."""
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
    """One finished sequence, up to an end of text that was written (which is left out)."""

    number: int
    """Of the prompt, from 1."""
    id: Any
    """What the user calls the prompt."""
    text: str | None
    """The whole text; None without a tokenizer."""
    new: str | None
    """What was written: the continuation, or the fillings joined by newlines."""
    tokens: list[int]
    """The whole sequence."""
    written: list[list[int]]
    """The written tokens of each gap; of a continuation there is one."""
    ended: bool
    """Whether it ends with an end of text."""
    forwards: int
    """Forward passes that it took part in."""
    positions: int
    """Positions that were run for it, over all these passes."""
    seconds: float
    """From its first pass to its last."""

    @property
    def new_tokens(self) -> int:
        """How many tokens were written."""
        return sum(map(len, self.written))

    @property
    def tokens_per_forward(self) -> float:
        """Written tokens per forward pass."""
        return self.new_tokens / max(1, self.forwards)

    def record(self) -> dict[str, Any]:
        """What a line of JSON says of it."""
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
        """From `record`. Raises KeyError where something is missing."""
        fields = ("number", "text", "new", "tokens", "written", "ended", "forwards", "positions", "seconds")
        return cls(id=record.get("id"), **{field: record[field] for field in fields})
