"""Texts out of JSON: a record on each line, an array of records, or one record that is the whole file."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from llada_megatron.llada_moe.errors import DataError

LONGEST_RECORD = 128 << 20
"""Bytes of the longest record that is read; a worker needs about ten times as much memory to encode it."""

_STEP = 1 << 20
"""Bytes that are read at once."""

_SPACE = " \t\n\r"


class TooLong(ValueError):
    """A record of more than LONGEST_RECORD bytes."""

    def __init__(self) -> None:
        super().__init__(f"a record of more than {LONGEST_RECORD >> 20} MiB")


def parse(data: bytes | str) -> Any:
    """The value that a JSON text stands for. Raises ValueError, also for one that is nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """The lines of a stream; None for one that is longer than LONGEST_RECORD, which is passed over in small parts."""
    while line := stream.readline(LONGEST_RECORD + 1):
        if len(line) <= LONGEST_RECORD:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(_STEP)
        yield None


def line_text(where: str, line: bytes, key: str) -> str:
    """The text of one JSON line. Raises DataError with where it stands."""
    try:
        record = parse(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    return record_text(where, record, key)


def record_text(where: str, record: Any, key: str) -> str:
    """The text of a record. Raises DataError with where it stands."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: a record must be a JSON object with the key {key!r}, not {type(record).__name__}")
    if key not in record:
        raise DataError(f"{where}: no key {key!r}; the record has {_listed(record)} (--jsonl-key)")
    text = record[key]
    if not isinstance(text, str):
        raise DataError(f"{where}: {key!r} is {type(text).__name__}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {key!r} holds half a surrogate pair at character {error.start}: not Unicode text"
        ) from error
    return text


def array_elements(stream: BinaryIO) -> Iterator[Any]:
    """The elements of a JSON array, read one by one. Raises ValueError where it is not JSON."""
    window = _Window(stream)
    window.expect("[")
    if window.next_is("]"):
        return
    while True:
        yield window.value()
        if window.next_is("]"):
            break
        window.expect(",")
    if rest := window.peek():
        raise ValueError(f"{rest!r} after the end of the array")


class _Window:
    """The part of a JSON text that is being read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._json = json.JSONDecoder()
        self._text, self._at, self._ended = "", 0, False

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in _SPACE:
                self._at += 1
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read(_STEP):
                return ""

    def next_is(self, character: str) -> bool:
        """Step over the character if it comes next."""
        if self.peek() != character:
            return False
        self._at += 1
        return True

    def expect(self, character: str) -> None:
        """Step over the character. Raises ValueError if another comes."""
        if not self.next_is(character):
            found = self.peek()
            raise ValueError(f"{character!r} expected, not " + (repr(found) if found else "the end of the file"))

    def value(self) -> Any:
        """The next value. Raises ValueError.

        What has been read for it doubles until it is whole, so that a long value is not tried again and again.
        """
        self.peek()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise ValueError("nested too deeply") from error
            except ValueError:
                end = -1
                if self._ended:
                    raise
            if 0 <= end < len(self._text) or (end >= 0 and self._ended):  # a number could go on beyond what was read
                self._at = end
                return value
            if len(self._text) - self._at > LONGEST_RECORD:
                raise TooLong
            self._read(max(_STEP, len(self._text) - self._at))

    def _read(self, size: int) -> bool:
        """Read on, forgetting what was stepped over; False at the end."""
        data = self._stream.read(size)
        self._ended = len(data) < size
        self._text = self._text[self._at :] + self._decoder.decode(data, final=self._ended)
        self._at = 0
        return bool(data)


def _listed(record: dict[str, Any], most: int = 10) -> str:
    """The keys of a record for a message."""
    names = [repr(key[:40]) for key in list(record)[:most]]
    return (", ".join(names) + (", …" if len(record) > most else "")) or "none"
