"""Conversations out of JSON records: `messages` with roles, and the `tools` that they may call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from llada_megatron.llada_moe.data import json_records
from llada_megatron.llada_moe.data.formats import Form, Reading
from llada_megatron.llada_moe.data.sources import CorpusFile
from llada_megatron.llada_moe.data.streams import DAMAGED, open_stream
from llada_megatron.llada_moe.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
"""Roles of a message in the format of transformers' chat templates."""


@dataclass(frozen=True)
class ChatRecord:
    """One conversation, as a chat template takes it."""

    where: str
    """File and line (or record), for messages."""
    messages: list[dict[str, Any]]
    """Each with `role` and `content` (text, or None where the assistant only calls tools)."""
    tools: list[Any] | None = None

    @property
    def answers(self) -> list[int]:
        """Numbers of the assistant's messages, from 0."""
        return [number for number, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the contents of all messages."""
        return sum(len((message["content"] or "").encode("utf-8")) for message in self.messages)


def chat_records(sources: Iterable[CorpusFile], reading: Reading) -> Iterator[ChatRecord | DataError]:
    """Every conversation of the sources in order; in the place of one that cannot be used, the error that says why.

    Raises:
        DataError: a file holds no JSON records.
    """
    for source in sources:
        try:
            for where, record in _records(source):
                try:
                    yield chat_record(where, record, reading.key)
                except DataError as error:
                    yield error
        except (ValueError, *DAMAGED) as error:
            yield DataError(f"{source.name}: cannot be read on: {error}")


def chat_record(where: str, record: Any, key: str) -> ChatRecord:
    """The conversation that a record holds under `key`. Raises DataError with where it stands."""
    if isinstance(record, Exception):
        raise DataError(f"{where}: {record}") from record
    if not isinstance(record, dict):
        raise DataError(f"{where}: a record must be a JSON object with the key {key!r}, not {type(record).__name__}")
    messages = record.get(key)
    if not isinstance(messages, list) or not messages:
        known = ", ".join(repr(name[:40]) for name in list(record)[:10]) or "none"
        found = f"is {type(messages).__name__}, not a list" if key in record and messages != [] else "has no messages"
        raise DataError(f"{where}: {key!r} {found}; the record has the keys {known} (--jsonl-key)")
    tools = record.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise DataError(f"{where}: 'tools' is {type(tools).__name__}, not a list")
    checked = [_message(f"{where}: message {number}", message) for number, message in enumerate(messages, 1)]
    chat = ChatRecord(where, checked, tools or None)
    if not chat.answers:
        raise DataError(f"{where}: no message of the assistant: there is no answer to learn")
    return chat


def _message(where: str, message: Any) -> dict[str, Any]:
    """One message with its content as text. Raises DataError."""
    if not isinstance(message, dict):
        raise DataError(f"{where} must be an object with role and content, not {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"{where}: unknown role {role!r}; known are {', '.join(ROLES)}")
    content, calls = _text(where, message.get("content")), message.get("tool_calls")
    if role == "assistant" and not calls and not (content or "").strip():
        raise DataError(f"{where}: the assistant's answer is empty")
    if content is None and not calls:
        raise DataError(f"{where} ({role}): no content")
    try:
        (content or "").encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: half a surrogate pair at character {error.start}: not Unicode text") from error
    return {**message, "content": content}


def _text(where: str, content: Any) -> str | None:
    """The text of a content, which may also be a list of parts that are all text. Raises DataError."""
    if content is None or isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) == len(parts) and all(isinstance(text, str) for text in texts):
        return "".join(texts)
    raise DataError(f"{where}: its content is neither text nor a list of texts")


def _records(source: CorpusFile) -> Iterator[tuple[str, Any]]:
    """Where each record of a file stands, and its JSON value, or the error of a line that has none."""
    if source.form not in (Form.LINES, Form.ARRAY, Form.OBJECT):
        raise DataError(
            f"{source.name}: {source.form.value}; conversations are read from JSON lines or a JSON array of records"
        )
    with open_stream(source.path) as stream:
        if source.form is Form.LINES:
            for number, line in enumerate(json_records.lines(stream), 1):
                if line is None or line.strip():
                    yield f"{source.name}:{number}", _parsed(line)
            return
        whole = source.form is Form.OBJECT
        values = [json_records.parse(stream.read())] if whole else json_records.array_elements(stream)
        for number, value in enumerate(values, 1):
            yield f"{source.name}: record {number}", value


def _parsed(line: bytes | None) -> Any:
    """The value of a line, or an error."""
    if line is None:
        return json_records.TooLong()
    try:
        return json_records.parse(line)
    except ValueError as error:
        return ValueError(f"not JSON ({error})")
