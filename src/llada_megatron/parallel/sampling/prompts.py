"""Prompts: texts or token ids that are to be continued, or whose gaps are to be filled."""

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
    """A place in a prompt where tokens are missing."""

    tokens: int | None = None
    """How many tokens; None = as many as `instead_of` has."""
    instead_of: str = ""
    """The text that is replaced."""


Piece = str | tuple[int, ...] | Gap
"""Text, token ids, or a gap."""


@dataclass(frozen=True)
class Prompt:
    """One prompt. Without a gap it is continued at its end; otherwise its gaps are filled."""

    pieces: tuple[Piece, ...]
    number: int = 1
    """Its number among the prompts of a file or a call, from 1. Random draws depend on it."""
    id: Any = None
    """The user's name for it."""
    max_new_tokens: int | None = None
    """Number of new tokens of a continuation; None = that of the settings."""

    @classmethod
    def of(cls, prompt: str | Sequence[int] | Prompt, number: int = 1) -> Prompt:
        """A prompt made of a text or of token ids, to be continued. A Prompt is returned with the number.

        Raises:
            ConfigError: `prompt` is something else.
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
            ConfigError: there is no gap, or one of no tokens.
        """
        pieces = split_gaps(text, word)
        if not any(isinstance(piece, Gap) for piece in pieces):
            raise ConfigError(f"no <{word}> to fill in {shown(text)}")
        return cls(tuple(pieces), number, id)

    @classmethod
    def edited(cls, text: str | Sequence[int], extent: Extent, tokens: int | None = None, number: int = 1) -> Prompt:
        """A finished text, or token ids, of which one extent is to be replaced.

        Args:
            text: the whole text, or all token ids.
            extent: what is replaced, counted in characters of a text or in token ids.
            tokens: how many tokens take its place; None = as many as are replaced.

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
        """The same prompt with this number of new tokens, unless it has one of its own."""
        return self if self.max_new_tokens is not None else replace(self, max_new_tokens=max_new_tokens)

    @property
    def infilling(self) -> bool:
        """Whether the prompt has gaps."""
        return any(isinstance(piece, Gap) for piece in self.pieces)

    @property
    def textual(self) -> bool:
        """Whether a tokenizer is needed."""
        return any(isinstance(piece, str) or (isinstance(piece, Gap) and piece.tokens is None) for piece in self.pieces)

    @property
    def digest(self) -> str:
        """A hash of everything that the prompt asks for, to tell whether it changed."""
        pieces = [[piece.tokens, piece.instead_of] if isinstance(piece, Gap) else piece for piece in self.pieces]
        text = json.dumps([pieces, [isinstance(piece, Gap) for piece in self.pieces], self.max_new_tokens])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __str__(self) -> str:
        """The prompt's name in messages."""
        if self.id is not None:
            return f"prompt {self.number} ({_cut(str(self.id))})"
        first = next((piece for piece in self.pieces if not isinstance(piece, Gap)), "")
        if isinstance(first, str):
            return f"prompt {self.number} {shown(first)}"
        ids = ", ".join(map(str, first[:8])) + (", …" if len(first) > 8 else "")
        return f"prompt {self.number} [{ids}]"


@dataclass(frozen=True)
class Extent:
    """A range START:END as in a Python slice: either end may be missing, and negative numbers count from the end."""

    start: int | None
    end: int | None

    @classmethod
    def parse(cls, text: str) -> Extent:
        """The extent that a text `START:END` stands for. Raises ConfigError if it is not of this form."""
        match = re.fullmatch(r"(-?\d{1,18})?:(-?\d{1,18})?", text.strip())
        if match is None:
            raise ConfigError(
                f"{text!r} is no extent: give START:END, such as 10:25 (characters; tokens for token ids)"
            )
        return cls(*(None if number is None else int(number) for number in match.groups()))

    def within(self, length: int) -> tuple[int, int]:
        """Start and end as positions in a text of this length. Raises ConfigError if they do not lie in it."""
        start, end = self.start or 0, length if self.end is None else self.end
        start, end = (length + position if position < 0 else position for position in (start, end))
        if not 0 <= start <= end <= length:
            raise ConfigError(f"the extent {start}:{end} does not lie in a text of length {length}")
        return start, end


def split_gaps(text: str, word: str = GAP_WORD) -> list[str | Gap]:
    """Split a text at its gap words, `<word>` or `<word:N>`, into strings and gaps. Raises ConfigError for N = 0."""
    pieces: list[str | Gap] = []
    position = 0
    for match in re.finditer(rf"<{re.escape(word)}(?::(\d+))?>", text):
        count = int((match[1] or "1")[:18])  # more digits are too many tokens for any model anyway
        if count == 0:
            raise ConfigError(f"{match[0]} in {shown(text)}: a gap has at least one token")
        pieces += [text[position : match.start()], Gap(count)]
        position = match.end()
    return [piece for piece in [*pieces, text[position:]] if piece]


def shown(text: str) -> str:
    """The beginning of a text, for a message."""
    return repr(_cut(text))


def require_text(text: str, name: str) -> None:
    """Refuse text that no tokenizer can encode. Raises DataError for bytes that were not UTF-8, and lone surrogates."""
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
