"""Conversations as training reads them: token ids, and which of them the assistant says.

An answer goes from where `llada chat` would begin to sample it, behind the template's generation prompt, to the special
token that ends the turn. Prompt and answer are encoded apart, as sampling meets them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llada_megatron.llada_moe.data.chat_records import ChatRecord
from llada_megatron.llada_moe.errors import ConfigError, DataError
from llada_megatron.parallel.sampling.chat_template import ChatTemplate, Message, Rendering, SpecialToken

_Parts = list[str | SpecialToken]


@dataclass(frozen=True)
class ChatTokens:
    """A conversation as tokens, without an end-of-text token behind it."""

    ids: list[int]
    answers: list[tuple[int, int]]
    """First token of each answer and the one behind its last, ascending."""


def chat_tokens(template: ChatTemplate, record: ChatRecord) -> list[ChatTokens]:
    """The tokens of a conversation with its answers.

    A template may write the history otherwise than what was said (for example without the assistant's reasoning). Then
    there is one entry for each answer, behind the history as the template writes it at that moment.

    Raises:
        DataError: with where the record stands: the template refuses it or cannot be run on it, does not begin an
            answer with its generation prompt, leaves out its calls or descriptions of tools, or would make special
            tokens out of the record's own text.
    """
    try:
        _refuse_names(template, record)
        _refuse_unwritten(template, record)
        return _chat_tokens(template, record)
    except (ConfigError, DataError) as error:
        raise DataError(f"{record.where}: {error}") from error


def _chat_tokens(template: ChatTemplate, record: ChatRecord) -> list[ChatTokens]:
    messages, tools = record.messages, record.tools
    texts = template.render(
        [
            Rendering(messages[: number + said], answer_follows=not said, tools=tools)
            for said in (False, True)
            for number in record.answers
        ]
    )
    before, behind = texts[: len(record.answers)], texts[len(record.answers) :]
    for number, first, last in zip(record.answers, before, behind, strict=True):
        if not last.startswith(first):
            raise DataError(
                f"message {number + 1}: the chat template does not begin an answer with its generation prompt, so that "
                "what is to be learnt cannot be told from the prompt"
            )
    end = record.answers[-1] + 1
    spans = [(len(first), len(last)) for first, last in zip(before, behind, strict=True)]
    if all(behind[-1].startswith(text) for text in (*before, *behind)):
        return [_encoded(template, messages[:end], tools, spans)]
    return [
        _encoded(template, messages[: number + 1], tools, [span])
        for number, span in zip(record.answers, spans, strict=True)
    ]


def _encoded(
    template: ChatTemplate, messages: Sequence[Message], tools: list[Any] | None, spans: list[tuple[int, int]]
) -> ChatTokens:
    """Encode a conversation, of whose text the `spans` of characters are answers."""
    whole, parts = template.parts(messages, answer_follows=False, tools=tools)
    ids: list[int] = []
    answers: list[tuple[int, int]] = []
    at = 0
    for first, last in spans:
        ids += template.ids_of(whole[at:first], list(_between(parts, at, first)))
        stop = _turn_end(parts, first, last)
        answer = template.ids_of(whole[first:stop], list(_between(parts, first, stop)))
        answers.append((len(ids), len(ids) + len(answer)))
        ids += answer
        at = stop
    return ChatTokens(ids, answers)


def _turn_end(parts: _Parts, first: int, last: int) -> int:
    """Where the answer at characters [first, last) ends: behind its last special token, if only space follows."""
    at, stop, text = 0, last, ""
    for part in parts:
        size = _size(part)
        if at >= first and at + size <= last:
            if isinstance(part, SpecialToken):
                stop, text = at + size, ""
            else:
                text += part
        at += size
    return stop if not text.strip() else last


def _between(parts: _Parts, begin: int, end: int) -> Iterator[str | SpecialToken]:
    """The parts at characters [begin, end); texts are cut there."""
    at = 0
    for part in parts:
        size = _size(part)
        low, high = max(begin, at), min(end, at + size)
        if low < high:
            yield part[low - at : high - at] if isinstance(part, str) else part
        at += size


def _size(part: str | SpecialToken) -> int:
    return len(part) if isinstance(part, str) else len(part.name)


def _refuse_names(template: ChatTemplate, record: ChatRecord) -> None:
    """Names of special tokens in a content are text; elsewhere (tools, calls) they could not be told from the
    template's own. Raises DataError."""
    others = [{**message, "content": None} for message in record.messages]
    for text in _texts([others, record.tools]):
        if (name := template.named(text)) is not None:
            raise DataError(f"{name} in a call or description of tools, where it would become a special token")


def _refuse_unwritten(template: ChatTemplate, record: ChatRecord) -> None:
    """Calls and tools that a template leaves out would not be learnt, and what answers them would have no cause.
    Raises DataError."""
    messages, tools = record.messages, record.tools
    without: dict[str, Rendering] = {}
    if any(message.get("tool_calls") for message in messages):
        bare = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
        without["tool calls"] = Rendering(bare, answer_follows=False, tools=tools)
    if tools:
        without["the descriptions of tools"] = Rendering(messages, answer_follows=False)
    if not without:
        return
    whole = template.render([Rendering(messages, answer_follows=False, tools=tools)])
    for what, rendering in without.items():
        other = None
        with contextlib.suppress(ConfigError, DataError):  # a template that refuses such a conversation reads them
            other = template.render([rendering])
        if other == whole:
            raise DataError(f"the chat template does not write {what}; give --template FILE with one that does")


def _texts(value: Any) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
