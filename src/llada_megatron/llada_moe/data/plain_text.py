"""Plain text: UTF-8 without NUL, read whole or in parts that are encoded one by one."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llada_megatron.llada_moe.data.streams import BUFFER, open_stream
from llada_megatron.llada_moe.data.tokenizer import LONG_TEXT


class NotText(Exception):
    """Bytes that are not UTF-8 text; the message says where."""


def read_text(path: Path) -> str:
    """A file's text, decompressed, without a byte-order mark. Raises NotText with the offset of the first bad byte."""
    with open_stream(path) as stream:
        return "".join(_decoded(stream))


def text_parts(path: Path, limit: int = LONG_TEXT) -> Iterator[str]:
    """A file's text in parts of at most `limit` characters, cut where `encode_long` would cut the whole text.

    At least one part, which is empty only if the text is. Raises NotText, and what `open_stream` raises.
    """
    text = ""
    with open_stream(path) as stream:
        for piece in _decoded(stream):
            text += piece
            start = 0
            while len(text) - start > limit:
                cut = text.rfind("\n", start, start + limit) + 1 or start + limit
                yield text[start:cut]
                start = cut
            text = text[start:]
    yield text


def check_text(path: Path) -> None:
    """Read a file to its end, and forget it. Raises NotText, and what `open_stream` raises."""
    with open_stream(path) as stream:
        for _ in _decoded(stream):
            pass


def _decoded(stream: BinaryIO) -> Iterator[str]:
    """The text of a stream as it comes. Raises NotText."""
    pending, offset = b"", 0
    while data := stream.read(BUFFER):
        pending += data
        if offset == 0 and pending.startswith(codecs.BOM_UTF8):
            pending, offset = pending[3:], 3
        text, used = _decode(pending, offset, final=False)
        pending, offset = pending[used:], offset + used
        yield text
    yield _decode(pending, offset, final=True)[0]


def _decode(data: bytes, offset: int, final: bool) -> tuple[str, int]:
    """Text and the number of bytes that it took. `offset` is where in the stream `data` begins."""
    nul = data.find(b"\0")
    try:
        text, used = codecs.utf_8_decode(data, "strict", final)
    except UnicodeDecodeError as error:
        if nul < 0 or error.start < nul:
            raise NotText(f"not UTF-8 text: byte 0x{data[error.start]:02x} at offset {offset + error.start}") from error
    if nul >= 0:
        raise NotText(f"not text: byte 0x00 at offset {offset + nul}")
    return text, used
