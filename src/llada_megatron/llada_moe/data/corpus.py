"""Text on disk as a sequence of documents: files, folders, JSON lines, gzip and Zstandard, in one fixed order."""

from __future__ import annotations

import gzip
import io
import json
import os
import stat
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from llada_megatron.llada_moe.data.packing import mix
from llada_megatron.llada_moe.errors import DataError

PYTHON_STDLIB = "python-stdlib"
"""An input that stands for the Python source files of the running interpreter's standard library."""

_STDLIB_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "_bundled"}
)

_COMPRESSED = {".gz", ".zst"}

_LINES = {".jsonl", ".ndjson"}

_CHUNK = 1 << 20
"""Bytes on disk that make one unit of work."""

_CHUNK_FILES = 64


class NotText(Exception):
    """Bytes that are not UTF-8 text; the message says where."""


@dataclass(frozen=True)
class CorpusFile:
    """One file of the corpus."""

    path: Path
    input: int
    """Which of the inputs it came from."""
    named: bool
    """Given by name: what is wrong with it is an error; in a folder, a file that is not text is passed over."""

    @property
    def lines(self) -> bool:
        """One JSON object per line (`.jsonl`, `.ndjson`, also compressed), each a document."""
        return Path(self.path.stem if self.path.suffix in _COMPRESSED else self.path.name).suffix in _LINES


@dataclass(frozen=True)
class Chunk:
    """A unit of work, whatever the number of workers: whole text files, or a run of lines of one JSON lines file."""

    sources: tuple[CorpusFile, ...]
    size: int
    """Bytes on disk that it stands for."""
    lines: tuple[bytes, ...] | None = None
    first_line: int = 0
    """Number of the first of `lines`, from 1."""


@dataclass(frozen=True)
class Skipped:
    """A file in a folder that was passed over."""

    path: Path
    reason: str


def find_sources(inputs: Iterable[str]) -> list[CorpusFile]:
    """The files that inputs mean, folders entered in sorted order. Raises DataError for an input that does not exist.

    Hidden files and folders and `__pycache__` are left out; links to folders are not followed.
    """
    sources: list[CorpusFile] = []
    for number, name in enumerate(inputs):
        path = Path(name)
        if name == PYTHON_STDLIB:
            sources += [CorpusFile(file, number, False) for file in _stdlib_files()]
        elif path.is_dir():
            sources += [CorpusFile(file, number, False) for file in _walk(path)]
        elif path.exists():
            sources.append(CorpusFile(path, number, True))
        else:
            raise DataError(f"{path}: no such file or folder")
    return sources


def chunks(sources: Iterable[CorpusFile]) -> Iterator[Chunk]:
    """The corpus in units of work, in order. Small text files share one; a JSON lines file is cut between lines."""
    group: list[CorpusFile] = []
    size = 0
    for source in sources:
        if group and (source.lines or source.input != group[0].input or size >= _CHUNK or len(group) >= _CHUNK_FILES):
            yield Chunk(tuple(group), size)
            group, size = [], 0
        if source.lines:
            yield from _line_chunks(source)
        else:
            group.append(source)
            size += _size(source.path)
    if group:
        yield Chunk(tuple(group), size)


def documents(chunk: Chunk, key: str, skipped: list[Skipped]) -> Iterator[str]:
    """The documents of a chunk; files passed over go to `skipped`. Raises DataError for what the user must mend."""
    if chunk.lines is not None:
        for number, line in enumerate(chunk.lines, chunk.first_line):
            if line.strip():
                yield _line_document(chunk.sources[0].path, number, line, key)
        return
    for source in chunk.sources:
        try:
            yield read_text(source.path)
        except (NotText, OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            reason = str(error) or type(error).__name__
            if source.named:
                raise DataError(f"{source.path}: {reason}") from error
            skipped.append(Skipped(source.path, reason))


def read_text(path: Path) -> str:
    """A file's text, decompressed, without a byte-order mark. Raises NotText with the offset of the first bad byte."""
    with _open(path) as stream:
        data = stream.read()
    data = data.removeprefix(b"\xef\xbb\xbf")
    nul = data.find(b"\0")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        first = error.start if nul < 0 else min(nul, error.start)
        raise NotText(f"not UTF-8 text: byte 0x{data[first]:02x} at offset {first}") from error
    if nul >= 0:
        raise NotText(f"not text: byte 0x00 at offset {nul}")
    return text


def total_size(sources: Iterable[CorpusFile]) -> int:
    """Bytes on disk of all sources."""
    return sum(_size(source.path) for source in sources)


def stdlib_folder() -> Path:
    """Where this interpreter keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def _stdlib_files() -> Iterator[Path]:
    """Python files of the standard library, without its test suites and without installed packages."""
    return (file for file in _walk(stdlib_folder(), _STDLIB_LEFT_OUT) if file.suffix == ".py")


def _walk(root: Path, left_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Regular files below a folder, each folder's own before its subfolders', sorted by name."""
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if not n.startswith(".") and n != "__pycache__" and n not in left_out)
        for name in sorted(files):
            path = Path(folder, name)
            if not name.startswith(".") and path.exists() and stat.S_ISREG(path.stat().st_mode):
                yield path


def _size(path: Path) -> int:
    """Bytes of a file, 0 for one that cannot be asked."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _open(path: Path) -> BinaryIO:
    """A file's bytes, decompressed according to its name."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstandardFrames(path.open("rb")), _CHUNK)  # type: ignore[return-value]
    return path.open("rb")


class _ZstandardFrames(io.RawIOBase):
    """Frames of a .zst file, one after the other. The package's own reader ends quietly where a file was cut off."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._text = memoryview(b"")

    def readable(self) -> bool:
        """It is for reading."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer with the next text. Raises EOFError inside a frame that does not end."""
        while not self._text:
            rest = self._frame.unused_data if self._frame is not None and self._frame.eof else b""
            data = rest or self._raw.read(_CHUNK)
            if self._frame is None or self._frame.eof:
                if not data:
                    return 0
                self._frame = zstandard.ZstdDecompressor().decompressobj()
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


def _line_chunks(source: CorpusFile) -> Iterator[Chunk]:
    """The lines of one JSON lines file in units of about a megabyte of text."""
    held: list[bytes] = []
    first, size, total = 1, 0, 0
    packed = source.path.suffix in _COMPRESSED
    try:
        with _open(source.path) as stream:
            for line in stream:
                held.append(line)
                size += len(line)
                if size >= _CHUNK:
                    yield Chunk((source,), 0 if packed else size, tuple(held), first)
                    first, total = first + len(held), total + (0 if packed else size)
                    held, size = [], 0
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{source.path}:{first + len(held)}: cannot be read on: {error}") from error
    # The last chunk accounts for the rest of the file: all of it where compression hides the position.
    yield Chunk((source,), max(0, _size(source.path) - total), tuple(held), first)


def _line_document(path: Path, number: int, line: bytes, key: str) -> str:
    """The text of one JSON line. Raises DataError with file and line."""
    where = f"{path}:{number}"
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a line must be a JSON object with the key {key!r}, not {type(record).__name__}")
    if key not in record:
        raise DataError(f"{where}: no key {key!r}; the line has {', '.join(map(repr, record)) or 'none'} (--jsonl-key)")
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


VOCABULARY_SAMPLE = 32 << 20
"""Characters that a vocabulary is trained on at most (byte-pair training takes about 0.2 s per million)."""

_PIECE = 16 << 10
"""Characters of one piece of the sample."""

_EXPANSION = 4
"""Text bytes assumed per byte of a compressed file, when the share to keep is estimated."""


def text_size(sources: Iterable[CorpusFile]) -> int:
    """Bytes of text in all sources, of compressed ones estimated."""
    return sum(total_size([source]) * (_EXPANSION if source.path.suffix in _COMPRESSED else 1) for source in sources)


def sample_texts(
    sources: Sequence[CorpusFile],
    key: str,
    budget: int = VOCABULARY_SAMPLE,
    wanted: Callable[[int], bool] = lambda number: True,
) -> Iterator[str]:
    """All texts of a corpus within the budget of characters; of a larger one, pieces chosen by a hash of their number.

    They are spread over the whole corpus and the same in every run. `wanted` says of the number of a document, counted
    from 0 without empty ones, whether it may be among them.
    """
    size = text_size(sources)
    share = min(1.0, budget / size) if size else 1.0
    taken = number = 0
    for document, text in enumerate(text for chunk in chunks(sources) for text in documents(chunk, key, []) if text):
        if wanted(document):
            for start in range(0, len(text), _PIECE):
                number += 1
                if share < 1.0 and mix(number) >= share * 2.0**64:
                    continue
                if taken >= 2 * budget:
                    return
                piece = text[start : start + _PIECE]
                taken += len(piece)
                yield piece
