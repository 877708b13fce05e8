"""Texts to be scored, from lines of JSON: whole texts, continuations of a context, and questions with options."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llada_megatron.llada_moe.data.tokenizer import Tokenizer, encode_long
from llada_megatron.llada_moe.errors import DataError
from llada_megatron.llada_moe.evaluation.queries import ModelKind, Pair, rolling

FORMS = '{"text": …}, {"context": …, "continuation": …} or {"context": …, "options": […], "answer": N}'
Content = str | tuple[int, ...]
"""A text, or token ids."""


@dataclass(frozen=True)
class ScoredLine:
    """What one line asks for."""

    number: int
    """Of the line, from 1; masks depend on it."""
    context: Content
    answers: tuple[Content, ...]
    """One for a whole text or a continuation, and the options of a question."""
    right: int | None = None
    """Which of the options is right; None where it is no question."""
    whole: bool = False
    """The answer is a whole text, which may be longer than the model's context."""
    id: Any = None
    """The user's name for it."""

    def pairs(self, tokenizer: Tokenizer | None, kind: ModelKind, longest: int, eos_id: int) -> list[list[Pair]]:
        """Pairs of each answer: one, or as many as a whole text has windows. An empty context of a model that
        predicts next tokens becomes the end-of-text token.

        Raises:
            DataError: a text without a tokenizer, an answer without tokens, or one too long for the model.
        """
        prefix = eos_id if kind.predicts_next else None
        try:
            if self.whole:
                ids = _ids(self.answers[0], tokenizer)
                if not ids:
                    raise DataError("the text has no token")
                return [rolling(ids, longest, prefix, self.number)]
            found = []
            for option, answer in enumerate(self.answers):
                context, ids = split_pair(self.context, answer, tokenizer)
                if not context and prefix is not None:
                    context = (prefix,)
                found.append([Pair(context, ids, self.number, option).fitted(longest)])
            return found
        except DataError as error:
            raise DataError(f"line {self.number}: {error}") from error


def split_pair(
    context: Content, answer: Content, tokenizer: Tokenizer | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a context and of the answer behind it, cut where lm-evaluation-harness cuts them.

    Spaces at the end of the context go to the answer, since most tokenizers join a space to the word behind it. Both
    together are encoded, and so many tokens belong to the context as it has alone.

    Raises:
        DataError: the answer has no token, or there is no tokenizer for a text.
    """
    if isinstance(context, str) and isinstance(answer, str):
        kept = context.rstrip()
        answer, context = context[len(kept) :] + answer, kept
        whole = _ids(context + answer, tokenizer)
        given = len(_ids(context, tokenizer)) if context else 0
        before, ids = whole[:given], whole[given:]
    else:
        before, ids = _ids(context, tokenizer), _ids(answer, tokenizer)
    if not ids:
        raise DataError(f"the answer {str(answer)[:40]!r} adds no token to its context")
    return before, ids


def parse_scored_lines(lines: Iterable[str], name: str) -> list[ScoredLine]:
    """Lines of JSON, blank ones passed over. Raises DataError with the name of the file and the line."""
    found = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found.append(_parsed(json.loads(line), number))
            except (ValueError, RecursionError) as error:
                raise DataError(f"{name}, line {number}: not JSON ({error})") from error
            except DataError as error:
                raise DataError(f"{name}, line {number}: {error}") from error
    if not found:
        raise DataError(f"{name}: no lines; each is {FORMS}")
    return found


def _parsed(values: Any, number: int) -> ScoredLine:
    if not isinstance(values, dict):
        raise DataError(f"a line is {FORMS}")
    name = values.get("id")
    if "text" in values:
        return ScoredLine(number, "", (_content(values, "text"),), whole=True, id=name)
    context = _content(values, "context")
    if "options" not in values:
        return ScoredLine(number, context, (_content(values, "continuation"),), id=name)
    options, right = values["options"], values.get("answer")
    if not isinstance(options, list) or len(options) < 2:
        raise DataError('"options" is a list of at least two texts')
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(options):
        raise DataError(f'"answer" is the number of the right option, 0 to {len(options) - 1}, not {right!r}')
    each = tuple(_content({"option": option}, "option") for option in options)
    return ScoredLine(number, context, each, right, id=name)


def _content(values: dict[str, Any], key: str) -> Content:
    if key not in values:
        raise DataError(f"no {key!r}: a line is {FORMS}")
    value = values[key]
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DataError(f"{key!r} is not UTF-8 text") from None
        return value
    if isinstance(value, list) and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value):
        return tuple(value)
    raise DataError(f"{key!r} is a text or a list of token ids")


def _ids(content: Content, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    if not isinstance(content, str):
        return content
    if not content:
        return ()
    if tokenizer is None:
        raise DataError("a text needs a tokenizer")
    return tuple(encode_long(tokenizer, content))


def known_ids(pairs: Sequence[Pair], vocab_size: int) -> None:
    """Refuse token ids that a model does not have. Raises DataError."""
    for pair in pairs:
        wrong = next((i for i in (*pair.context, *pair.answer) if i >= vocab_size), None)
        if wrong is not None:
            raise DataError(f"line {pair.question}: the model has no token {wrong}, its ids are 0 to {vocab_size - 1}")
