"""What became of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
