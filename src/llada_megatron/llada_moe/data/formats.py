"""What a file holds, told by its first bytes and records; its name only counts where these say nothing."""

from __future__ import annotations

import contextlib
import itertools
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO

from llada_megatron.llada_moe.data import json_records, tables
from llada_megatron.llada_moe.data.streams import (
    COMPRESSIONS,
    DAMAGED,
    compression_of,
    open_stream,
    read_head,
    without_compression,
)

READABLE = (
    "UTF-8 text, JSON lines, JSON arrays of records, each also compressed with "
    f"{', '.join(COMPRESSIONS)}; Parquet, Arrow and folders saved by `datasets` (with pyarrow)"
)
"""The formats that can be read, for messages."""

_PROBED = 4
"""Records that are looked at in order to tell what a file holds."""

_LARGEST_OBJECT = 16 << 20
"""Bytes of the largest file that is tried as one JSON record."""

_SPACE = b"\xef\xbb\xbf \t\r\n"


class Form(Enum):
    """How a file holds its documents."""

    TEXT = "plain text"
    """One document."""
    LINES = "JSON lines"
    """A record on each line."""
    ARRAY = "a JSON array"
    """An array of records."""
    OBJECT = "one JSON record"
    """A record, on one line or several."""
    TABLE = "Parquet or Arrow"
    """A row for each document."""


@dataclass(frozen=True)
class Reading:
    """How the inputs are read."""

    key: str = "text"
    """Key or column of the text."""
    as_text: bool = False
    """Every file is plain text, whatever it looks like."""
    skip_broken: int = 0
    """Records that may be left out because they cannot be read."""


@dataclass(frozen=True)
class Recognised:
    """What a file was found to hold."""

    form: Form
    compressed: bool = False
    by_content: bool = False
    """Its name does not say so."""
    keyless: bool = False
    """Plain text for want of records with the key, though it looks like JSON."""


def recognise(path: Path, name: str, reading: Reading, named: bool) -> Recognised:
    """Tell what a file holds. Of a file that cannot be read the name is believed: reading it will give the reason.

    Args:
        path: the file.
        name: what the user knows it by.
        reading: how inputs are read.
        named: the user gave this file by name; an array without the key is then refused by its reader, while in a
            folder, where configuration files of this kind lie about, it is plain text.
    """
    told = _by_name(name)
    try:
        head = read_head(path)
        compressed = compression_of(head) is not None
        if reading.as_text:
            return Recognised(Form.TEXT, compressed)
        if tables.begins_table(head) or told is Form.TABLE:
            return Recognised(Form.TABLE, False, told is not Form.TABLE)
        if not compressed and head.lstrip(_SPACE)[:1] not in (b"", b"{", b"["):
            return Recognised(told)
        with open_stream(path) as stream:
            form, keyless = _json_form(stream, told, reading.key, named, _unpacked_suffix(name) == ".json")
    except DAMAGED:
        return Recognised(Form.TEXT if reading.as_text else told)
    return Recognised(form, compressed, form is not told, keyless)


def _by_name(name: str) -> Form:
    """What a file's name says that it holds."""
    suffix = _unpacked_suffix(name)
    if suffix in (".jsonl", ".ndjson"):
        return Form.LINES
    return Form.TABLE if suffix in (".parquet", ".arrow") else Form.TEXT


def _unpacked_suffix(name: str) -> str:
    """The ending of a name without that of a compression, in small letters."""
    return Path(without_compression(name)).suffix.lower()


def _json_form(stream: BinaryIO, told: Form, key: str, named: bool, called_json: bool) -> tuple[Form, bool]:
    """What a stream of text holds, and whether it is JSON that is read as plain text."""
    head = stream.peek(4096).lstrip(_SPACE)  # type: ignore[attr-defined]
    if head[:1] == b"{":
        form = Form.LINES if told is Form.LINES else _form_of_objects(stream, key)
    elif re.match(rb"\[\s*\{", head):
        form = _form_of_array(stream, told, key, named)
    elif called_json and head[:1] == b"[":
        form = None
    else:
        return told, False
    if form is None:
        return Form.TEXT, True
    return (form, False) if form is not Form.TEXT else (Form.TEXT, called_json)


def _form_of_objects(stream: BinaryIO, key: str) -> Form | None:
    """What begins with `{`: lines, one record, None for JSON without the key, or plain text that only begins so."""
    some = list(itertools.islice((line for line in json_records.lines(stream) if line and line.strip()), _PROBED))
    found = [value for line in some if isinstance(value := _value(line), dict)]
    if any(key in value for value in found) or len(found) > 1:
        return Form.LINES
    rest = stream.read(_LARGEST_OBJECT)
    if len(rest) == _LARGEST_OBJECT:
        return Form.TEXT
    whole = found[0] if found and len(some) == 1 else _value(b"".join(some) + rest)
    if not isinstance(whole, dict):
        return Form.TEXT
    return Form.OBJECT if key in whole else None


def _form_of_array(stream: BinaryIO, told: Form, key: str, named: bool) -> Form | None:
    """What begins with `[{`: an array, None for one without the key, or plain text that only begins so."""
    first_line, end, _ = stream.peek(4096).partition(b"\n")  # type: ignore[attr-defined]
    if told is Form.LINES and end and _value(first_line) is not None:
        return Form.LINES
    found: list[Any] = []
    with contextlib.suppress(ValueError):
        for value in itertools.islice(json_records.array_elements(stream), _PROBED):
            found.append(value)  # what comes before an error counts, and its reader will meet the error again
    if not found:
        return told
    if named or any(isinstance(value, dict) and key in value for value in found):
        return Form.ARRAY
    return None


def _value(data: bytes) -> Any:
    """The JSON value of a text; None if it is not JSON."""
    try:
        return json_records.parse(data)
    except ValueError:
        return None
