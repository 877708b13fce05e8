"""The bytes of a file, decompressed as its first bytes say, a bounded number at a time."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

BUFFER = 1 << 20
"""Bytes that a stream reads ahead."""

HEAD = 64
"""Bytes from which a file's compression or container is told."""

COMPRESSIONS = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame, or one that readers pass over
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
}
"""Compressions by their name, and how such a file begins."""

_SUFFIXES = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bzip2", ".xz": "xz"}

_ZSTD_PIECE = 2 << 10
"""Compressed bytes given to zstd at once. A block of 4 bytes can stand for 128 KiB, so 2 KiB may become 64 MiB."""

_ZSTD_WINDOW = 1 << 31
"""Longest window that zstd writes (`zstd --long=31`); reading such a file takes as much memory."""


class NotCompressed(Exception):
    """A file that is not compressed as its name says."""


DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, NotCompressed)
"""What opening and reading a stream may raise."""


def compression_of(head: bytes) -> str | None:
    """The compression of a file that begins with `head`; None if it is not compressed."""
    return next((name for name, magic in COMPRESSIONS.items() if magic.match(head)), None)


def named_compression(name: str) -> str | None:
    """The compression that a file's name speaks of."""
    return _SUFFIXES.get(Path(name).suffix.lower())


def without_compression(name: str) -> str:
    """A file's name without the ending of a compression."""
    return Path(name).stem if named_compression(name) else name


def read_head(path: Path) -> bytes:
    """The first bytes of a file as they are stored. Raises OSError."""
    with path.open("rb") as stream:
        return stream.read(HEAD)


def open_stream(path: Path) -> BinaryIO:
    """A file's bytes, decompressed. Raises one of DAMAGED, here or while reading."""
    head = read_head(path)
    packed, named = compression_of(head), named_compression(path.name)
    if packed is None and named is not None and head:
        raise NotCompressed(f"not compressed with {named}, though its name says so (it begins with {head[:8]!r})")
    if packed is None:
        return path.open("rb")
    return io.BufferedReader(_OPENERS[packed](path), BUFFER)  # type: ignore[return-value]


class _ZstandardFrames(io.RawIOBase):
    """Frames of a .zst file, one after the other. The package's own reader ends quietly where a file was cut off."""

    def __init__(self, path: Path) -> None:
        self._raw = path.open("rb")
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._text = memoryview(b"")

    def readable(self) -> bool:
        """It is for reading."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with the next text. Raises EOFError inside a frame that does not end."""
        while not self._text:
            rest = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            data = rest or self._raw.read(_ZSTD_PIECE)
            if self._frame is None or self._frame.eof:
                if not data:
                    return 0
                self._frame = self._decompressor.decompressobj()
            elif not data:
                raise EOFError("compressed file ended before the end of its last frame")
            self._text = memoryview(self._frame.decompress(data))
        count = min(len(buffer), len(self._text))
        buffer[:count], self._text = self._text[:count], self._text[count:]
        return count

    def close(self) -> None:
        """Close the file below as well."""
        self._raw.close()
        super().close()


_OPENERS: dict[str, Callable[[Path], Any]] = {
    "gzip": gzip.GzipFile, "zstd": _ZstandardFrames, "bzip2": bz2.BZ2File, "xz": lzma.LZMAFile,
}  # fmt: skip
