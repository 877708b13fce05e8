"""A corpus as a sequence of documents, cut into units of work in one fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from llada_megatron.llada_moe.data import json_records
from llada_megatron.llada_moe.data.formats import READABLE, Form, Reading
from llada_megatron.llada_moe.data.packing import mix
from llada_megatron.llada_moe.data.plain_text import NotText, check_text, read_text, text_parts
from llada_megatron.llada_moe.data.sources import CorpusFile, size_on_disk, total_size
from llada_megatron.llada_moe.data.streams import DAMAGED, open_stream
from llada_megatron.llada_moe.data.tables import DamagedTable, table_texts
from llada_megatron.llada_moe.errors import DataError

_CHUNK = 1 << 20
"""Bytes that make one unit of work."""

_CHUNK_FILES = 64

_EXAMPLES = 3
"""Messages about broken records that are kept."""

_LARGE_TEXT = 8 << 20
"""Bytes of a plain text file from which on it is read and encoded in parts, so that memory stays bounded."""


@dataclass(frozen=True)
class Broken:
    """A record that holds no text; the message says where and why."""

    message: str


@dataclass(frozen=True)
class Skipped:
    """A file in a folder that was passed over."""

    name: str
    input: int
    reason: str


@dataclass(frozen=True)
class Chunk:
    """A unit of work, whatever the number of workers.

    It is some whole text files, or some records of one file, or a part of one large text.
    """

    sources: tuple[CorpusFile, ...]
    size: int
    """Bytes on disk that it stands for."""
    records: tuple[bytes | str | Broken | Skipped, ...] | None = None
    """Lines of JSON (bytes), texts, and what could not be read; None for whole text files."""
    first_line: int = 0
    """Number of the first line in `records`, from 1."""
    begins: bool = True
    """Its first document begins here; False for a later part of a large text."""
    ends: bool = True
    """Its last document ends here."""


@dataclass
class Dropped:
    """What was met and is no document."""

    files: list[Skipped] = field(default_factory=list)
    broken: int = 0
    """Broken records left out."""
    first_broken: list[str] = field(default_factory=list)
    """Messages of the first few."""

    def add(self, other: Dropped, reading: Reading) -> None:
        """Count what was met elsewhere as well. Raises DataError at one broken record too many."""
        self.files += other.files
        self.broken += other.broken
        self.first_broken = (self.first_broken + other.first_broken)[:_EXAMPLES]
        if self.broken > reading.skip_broken:
            allowed = f" (more than the {reading.skip_broken} broken records of --skip-broken)"
            raise DataError((other.first_broken or self.first_broken)[-1] + (allowed if reading.skip_broken else ""))

    def add_broken(self, message: str, reading: Reading) -> None:
        """Count a broken record. Raises DataError at one too many."""
        self.add(Dropped(broken=1, first_broken=[message]), reading)


def chunks(sources: Iterable[CorpusFile], reading: Reading) -> Iterator[Chunk]:
    """The corpus in units of work, in order. Small text files share one; other files are cut between records."""
    group: list[CorpusFile] = []
    size = 0
    for source in sources:
        on_disk = size_on_disk(source.path)
        alone = source.form is not Form.TEXT or source.compressed or on_disk >= _LARGE_TEXT
        if group and (alone or source.input != group[0].input or size >= _CHUNK or len(group) >= _CHUNK_FILES):
            yield Chunk(tuple(group), size)
            group, size = [], 0
        if not alone:
            group.append(source)
            size += on_disk
        elif source.form is Form.TEXT:
            yield from _text_chunks(source, on_disk)
        else:
            yield from _record_chunks(source, on_disk, reading.key)
    if group:
        yield Chunk(tuple(group), size)


def documents(chunk: Chunk, reading: Reading, dropped: Dropped) -> Iterator[str]:
    """The documents of a chunk, or a part of one; what is none goes to `dropped`.

    Raises:
        DataError: a named file is not text, or there are more broken records than `reading` allows.
    """
    if chunk.records is None:
        yield from _whole_texts(chunk.sources, dropped)
        return
    name = chunk.sources[0].name
    for number, record in enumerate(chunk.records, chunk.first_line):
        if isinstance(record, Skipped):
            dropped.files.append(record)
        elif isinstance(record, Broken):
            dropped.add_broken(record.message, reading)
        elif isinstance(record, str):
            yield record
        elif record.strip():
            try:
                text = json_records.line_text(f"{name}:{number}", record, reading.key)
            except DataError as error:
                hint = "; recognised as JSON lines, `--format text` reads it as plain text"
                dropped.add_broken(f"{error}{hint if chunk.sources[0].by_content else ''}", reading)
            else:
                yield text


def _whole_texts(sources: Iterable[CorpusFile], dropped: Dropped) -> Iterator[str]:
    """The texts of small files."""
    for source in sources:
        try:
            yield read_text(source.path)
        except (NotText, *DAMAGED) as error:
            dropped.files.append(_not_text(source, error))


def _not_text(source: CorpusFile, error: Exception) -> Skipped:
    """The entry of a file in a folder that is not text. Raises DataError for one that was named."""
    reason = (error.strerror if isinstance(error, OSError) else "") or str(error) or type(error).__name__
    if source.named:
        known = f"; what can be read: {READABLE}" if isinstance(error, NotText) else ""
        raise DataError(f"{source.name}: {reason}{known}") from error
    return Skipped(source.name, source.input, reason)


def _text_chunks(source: CorpusFile, on_disk: int) -> Iterator[Chunk]:
    """A large or compressed text in the parts in which it is encoded.

    One in a folder is first read to its end: what is no text is to be passed over before anything of it is written.
    """
    begins, held = True, None
    try:
        if not source.named:
            check_text(source.path)
        for part in text_parts(source.path):
            if held is not None:
                size = min(len(held), on_disk)
                yield Chunk((source,), size, (held,), begins=begins, ends=False)
                begins, on_disk = False, on_disk - size
            held = part
    except (NotText, *DAMAGED) as error:
        yield Chunk((source,), on_disk, (_not_text(source, error),))
        return
    yield Chunk((source,), on_disk, (held or "",), begins=begins)


def _record_chunks(source: CorpusFile, on_disk: int, key: str) -> Iterator[Chunk]:
    """The records of one file in units of about a megabyte of text."""
    held: list[bytes | str | Broken] = []
    first, size = 1, 0
    for record in _records(source, key):
        held.append(record)
        size += len(record) if isinstance(record, bytes | str) else 0
        if size >= _CHUNK:
            done = 0 if source.compressed else min(size, on_disk)
            yield Chunk((source,), done, tuple(held), first)
            first, on_disk = first + len(held), on_disk - done
            held, size = [], 0
    # The last chunk accounts for the rest of the file: all of it where compression hides the position.
    yield Chunk((source,), on_disk, tuple(held), first)


def _records(source: CorpusFile, key: str) -> Iterator[bytes | str | Broken]:
    """The records of one file: lines as they are, of other files the texts. A file that ends early ends broken."""
    number = 1
    try:
        for record in _raw_records(source, key):
            yield record
            number += 1
    except (DamagedTable, ValueError, *DAMAGED) as error:
        between = ":" if source.form is Form.LINES else ": record "
        yield Broken(f"{source.name}{between}{number}: cannot be read on: {error}")


def _raw_records(source: CorpusFile, key: str) -> Iterator[bytes | str | Broken]:
    """What `_records` gives, as far as the file can be read."""
    if source.form is Form.TABLE:
        for number, text in enumerate(table_texts(source.path, source.name, key), 1):
            yield Broken(f"{source.name}: row {number}: no text in column {key!r}") if text is None else text
        return
    with open_stream(source.path) as stream:
        if source.form is Form.LINES:
            for number, line in enumerate(json_records.lines(stream), 1):
                yield Broken(f"{source.name}:{number}: {json_records.TooLong()}") if line is None else line
            return
        name, whole = source.name, source.form is Form.OBJECT
        records = [json_records.parse(stream.read())] if whole else json_records.array_elements(stream)
        for number, record in enumerate(records, 1):
            try:
                yield json_records.record_text(f"{name}: record {number}", record, key)
            except DataError as error:
                yield Broken(str(error))


def _numbered(sources: Iterable[CorpusFile], reading: Reading) -> Iterator[tuple[int, str]]:
    """All texts with the number of their document, from 0 without empty ones; a large text comes in parts."""
    document, dropped = -1, Dropped()
    for chunk in chunks(sources, reading):
        for text in documents(chunk, reading, dropped):
            if text:
                document += chunk.begins
                yield document, text


VOCABULARY_SAMPLE = 32 << 20
"""Characters that a vocabulary is trained on at most (byte-pair training takes about 0.2 s per million)."""

_PIECE = 16 << 10
"""Characters of one piece of the sample."""

_EXPANSION = 4
"""Text bytes assumed per byte of a compressed file, when the share to keep is estimated."""


def text_size(sources: Iterable[CorpusFile]) -> int:
    """Bytes of text in all sources, of compressed ones and of tables estimated."""
    return sum(total_size([s]) * (_EXPANSION if s.compressed or s.form is Form.TABLE else 1) for s in sources)


def sample_texts(
    sources: Sequence[CorpusFile],
    reading: Reading,
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
    for document, text in _numbered(sources, reading):
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
