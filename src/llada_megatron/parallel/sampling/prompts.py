"""What is to be written: texts or token ids, with an open end or with gaps."""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from llada_megatron.llada_moe.errors import ConfigError, DataError

GAP_WORD = "mask"
"""Gaps in a text are `<mask>` (one token) and `<mask:N>`."""


@dataclass(frozen=True)
class Gap:
    """Tokens that are missing."""

    tokens: int | None = None
    """How many; None = as many as `instead_of` has."""
    instead_of: str = ""
    """The text that was cut out."""


Piece = str | tuple[int, ...] | Gap
"""Text, token ids, or a gap."""


@dataclass(frozen=True)
class Prompt:
    """One sequence to be written. Without a gap it is continued at its end, else its gaps are filled."""

    pieces: tuple[Piece, ...]
    number: int = 1
    """From 1: its place among the prompts of a file or a call. Random draws depend on it."""
    id: Any = None
    """What the user calls it."""
    max_new_tokens: int | None = None
    """Of a continuation; None = as the settings say."""

    @classmethod
    def of(cls, prompt: str | Sequence[int] | Prompt, number: int = 1) -> Prompt:
        """A prompt of a text or of token ids, to be continued; a Prompt takes the number.

        Raises:
            ConfigError: it is something else.
        """
        if isinstance(prompt, Prompt):
            return replace(prompt, number=number)
        if isinstance(prompt, str):
            return cls((prompt,), number)
        return cls((_ids(prompt),), number)

    @classmethod
    def with_gaps(cls, text: str, word: str = GAP_WORD, number: int = 1, id: Any = None) -> Prompt:
        """A text in which `<word>` stands for one missing token and `<word:N>` for N of them.

        Raises:
            ConfigError: there is none, or one of no tokens.
        """
        pieces = split_gaps(text, word)
        if not any(isinstance(piece, Gap) for piece in pieces):
            raise ConfigError(f"no <{word}> to fill in {shown(text)}")
        return cls(tuple(pieces), number, id)

    @classmethod
    def edited(cls, text: str | Sequence[int], extent: Extent, tokens: int | None = None, number: int = 1) -> Prompt:
        """A finished text or token ids of which one extent is to be written anew.

        Args:
            text: the whole.
            extent: characters of a text, positions of token ids.
            tokens: how many are written; None = as many as are cut out.

        Raises:
            ConfigError: the extent does not lie in the text, or is empty and `tokens` is not given.
        """
        text = text if isinstance(text, str) else _ids(text)
        start, end = extent.within(len(text))
        unit = "characters" if isinstance(text, str) else "tokens"
        if start == end and tokens is None:
            raise ConfigError(
                f"the extent {start}:{end} of a text of {len(text)} {unit} is empty: say with --max-new-tokens "
                "how many tokens are to be put there"
            )
        if isinstance(text, str):
            gap = Gap(tokens, text[start:end]) if tokens is None else Gap(tokens)
            pieces: list[Piece] = [text[:start], gap, text[end:]]
        else:
            gap = Gap(end - start if tokens is None else tokens)
            pieces = [text[:start], gap, text[end:]]
        return cls(tuple(piece for piece in pieces if piece), number)

    def with_length(self, max_new_tokens: int) -> Prompt:
        """The same with so many new tokens where it is continued and does not say itself how many."""
        return self if self.max_new_tokens is not None else replace(self, max_new_tokens=max_new_tokens)

    @property
    def infilling(self) -> bool:
        """Whether it has gaps."""
        return any(isinstance(piece, Gap) for piece in self.pieces)

    @property
    def textual(self) -> bool:
        """Whether a tokenizer is needed."""
        return any(isinstance(piece, str) or (isinstance(piece, Gap) and piece.tokens is None) for piece in self.pieces)

    @property
    def digest(self) -> str:
        """Of what it asks for."""
        pieces = [[piece.tokens, piece.instead_of] if isinstance(piece, Gap) else piece for piece in self.pieces]
        text = json.dumps([pieces, [isinstance(piece, Gap) for piece in self.pieces], self.max_new_tokens])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        """How messages name it."""
        if self.id is not None:
            return f"prompt {self.number} ({_cut(str(self.id))})"
        first = next((piece for piece in self.pieces if not isinstance(piece, Gap)), "")
        if isinstance(first, str):
            return f"prompt {self.number} {shown(first)}"
        ids = ", ".join(map(str, first[:8])) + (", …" if len(first) > 8 else "")
        return f"prompt {self.number} [{ids}]"


@dataclass(frozen=True)
class Extent:
    """START:END as in a Python slice: either end may be left out, and negative numbers count from the end."""

    start: int | None
    end: int | None

    @classmethod
    def parse(cls, text: str) -> Extent:
        """From `START:END`. Raises ConfigError."""
        match = re.fullmatch(r"(-?\d{1,18})?:(-?\d{1,18})?", text.strip())
        if match is None:
            raise ConfigError(
                f"{text!r} is no extent: give START:END, such as 10:25 (characters; tokens for token ids)"
            )
        return cls(*(None if number is None else int(number) for number in match.groups()))

    def within(self, length: int) -> tuple[int, int]:
        """The two ends in a text of this length. Raises ConfigError where they do not lie in it."""
        start, end = self.start or 0, length if self.end is None else self.end
        start, end = (length + place if place < 0 else place for place in (start, end))
        if not 0 <= start <= end <= length:
            raise ConfigError(f"the extent {start}:{end} does not lie in a text of length {length}")
        return start, end


def split_gaps(text: str, word: str = GAP_WORD) -> list[str | Gap]:
    """A text as strings and gaps, where it has `<word>` or `<word:N>`. Raises ConfigError for N = 0."""
    pieces: list[str | Gap] = []
    position = 0
    for match in re.finditer(rf"<{re.escape(word)}(?::(\d+))?>", text):
        count = int((match[1] or "1")[:18])  # no model takes so many that more digits would tell
        if count == 0:
            raise ConfigError(f"{match[0]} in {shown(text)}: a gap has at least one token")
        pieces += [text[position : match.start()], Gap(count)]
        position = match.end()
    return [piece for piece in [*pieces, text[position:]] if piece]


def shown(text: str) -> str:
    """A text's beginning, for a message."""
    return repr(_cut(text))


def require_text(text: str, name: str) -> None:
    """Refuse what no tokenizer takes. Raises DataError for bytes that were no UTF-8, and for halves of characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name}: not UTF-8 text (character {error.start} is {text[error.start]!a}, half of a character or a byte "
            "of another encoding)"
        ) from None


def _cut(text: str) -> str:
    return text if len(text) <= 40 else text[:40] + "…"


def _ids(prompt: Any) -> tuple[int, ...]:
    """Token ids of a sequence, an array or a tensor. Raises ConfigError for anything else."""
    try:
        if isinstance(prompt, bytes | bytearray | Mapping | Set):
            raise TypeError
        each = [i for i in prompt if not isinstance(i, bool)]
        if len(each) != len(prompt):
            raise TypeError
        return tuple(map(operator.index, each))
    except (TypeError, ValueError):
        raise ConfigError(f"a prompt is a text, a list of token ids or a Prompt, not {str(prompt)[:60]!r}") from None
