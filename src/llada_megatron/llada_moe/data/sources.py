"""Which files the inputs of a corpus mean: files, folders in sorted order, pipes; and what in folders is left out."""

from __future__ import annotations

import json
import os
import shutil
import stat
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import zstandard

from llada_megatron.llada_moe.data.formats import Form, Reading, recognise
from llada_megatron.llada_moe.data.generated_chats import generated_chats
from llada_megatron.llada_moe.data.streams import HEAD, compression_of
from llada_megatron.llada_moe.data.tables import begins_table, saved_splits
from llada_megatron.llada_moe.errors import DataError

PYTHON_STDLIB = "python-stdlib"
"""An input that stands for the Python source files of the running interpreter's standard library."""

GENERATED_CHATS = "generated-chats"
"""An input that stands for short conversations that are made up here (see `generated_chats`)."""

STANDARD_INPUT = "-"
"""An input that stands for what comes through standard input."""

_STDLIB_LEFT_OUT = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib-dynload", "_bundled"}
)

_EXAMPLES = 3
"""Names that a note lists."""


@dataclass(frozen=True)
class CorpusFile:
    """One file of the corpus."""

    path: Path
    input: int
    """Which of the inputs it came from."""
    named: bool
    """Given by name: what is wrong with it is an error; in a folder, a file that is not text is passed over."""
    form: Form = Form.TEXT
    compressed: bool = False
    by_content: bool = False
    """Its form was told by what it holds, not by its name."""
    title: str = ""
    """What messages call it, if not by its path."""

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.title or shown(self.path)


@dataclass
class Notes:
    """What is said about the inputs before they are read."""

    lines: list[str] = field(default_factory=list)
    left_out: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Names by the reason why they are no part of the corpus."""

    def say(self) -> Iterator[str]:
        """All notes, one line each."""
        yield from self.lines
        for reason, names in self.left_out.items():
            yield f"left out of folders, {reason}: {_some(names)}"


def shown(path: str | Path) -> str:
    """A path for messages: bytes that are not UTF-8 and control characters are written as escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def find_sources(
    inputs: Iterable[str], reading: Reading | None = None, spool: Path | None = None, notes: Notes | None = None
) -> list[CorpusFile]:
    """The files that inputs mean, folders entered in sorted order, each with what it was found to hold.

    Hidden files and folders and `__pycache__` are left out; links to folders are not followed. A pipe can be read only
    once and only by this process, so its content is written to a file first.

    Args:
        inputs: names as `llada prepare` takes them.
        reading: how files are read.
        spool: folder for the content of pipes.
        notes: takes what has to be said.

    Raises:
        DataError: an input does not exist, cannot be read, or is neither file, folder nor pipe.
    """
    reading, notes = reading or Reading(), notes or Notes()
    sources: list[CorpusFile] = []
    for number, name in enumerate(inputs):
        if name == PYTHON_STDLIB:
            sources += [CorpusFile(file, number, False) for file in _stdlib_files()]
        else:
            found = _files_of(name, number, spool, notes)
            sources += _recognised(found, reading, notes)
    return sources


def stdlib_folder() -> Path:
    """Where this interpreter keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def size_on_disk(path: Path) -> int:
    """Bytes of a file, 0 for one that cannot be asked."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def total_size(sources: Iterable[CorpusFile]) -> int:
    """Bytes on disk of all sources."""
    return sum(size_on_disk(source.path) for source in sources)


def _files_of(name: str, number: int, spool: Path | None, notes: Notes) -> list[CorpusFile]:
    """The files of one input, not looked into yet."""
    path = Path(name)
    if name == GENERATED_CHATS:
        return [_generated(number, spool)]
    if name == STANDARD_INPUT:
        return [_spooled(None, number, spool, notes)]
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        raise DataError(f"{shown(path)}: no such file or folder") from error
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        return [CorpusFile(file, number, False) for file in _walk(path, notes)]
    if stat.S_ISFIFO(mode) or (stat.S_ISREG(mode) and path.is_relative_to("/dev")):
        return [_spooled(path, number, spool, notes)]
    if not stat.S_ISREG(mode):
        raise DataError(f"{shown(path)}: a device or socket; an input is a file, a folder, a pipe, or - for stdin")
    return [CorpusFile(path, number, True)]


def _recognised(found: list[CorpusFile], reading: Reading, notes: Notes) -> list[CorpusFile]:
    """The files with what they hold; what their names do not say is noted."""
    told: defaultdict[Form, list[str]] = defaultdict(list)
    keyless, sources = [], []
    for source in found:
        result = recognise(source.path, source.title or source.path.name, reading, source.named)
        file = CorpusFile(
            source.path, source.input, source.named, result.form, result.compressed, result.by_content, source.title
        )
        sources.append(file)
        if result.by_content:
            told[result.form].append(file.name)
        if result.keyless:
            keyless.append(file.name)
    for form, names in told.items():
        notes.lines.append(f"read as {form.value}, by what it holds: {_some(names)}")
    if keyless:
        notes.lines.append(
            f"read as plain text, though it looks like JSON, for want of records with the key {reading.key!r} "
            f"(--jsonl-key): {_some(keyless)}"
        )
    return sources


def _generated(number: int, folder: Path | None) -> CorpusFile:
    """A file with the conversations of GENERATED_CHATS."""
    if folder is None:
        raise DataError(f"{GENERATED_CHATS}: made by `llada prepare` only")
    target = folder / f"input-{number}"
    with target.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"messages": messages}) + "\n" for messages in generated_chats())
    return CorpusFile(target, number, True, title=f"{GENERATED_CHATS}.jsonl")


def _spooled(path: Path | None, number: int, folder: Path | None, notes: Notes) -> CorpusFile:
    """A file with what comes through a pipe, or through standard input."""
    title = "standard input" if path is None else shown(path)
    if folder is None:
        raise DataError(f"{title}: a pipe can be read by `llada prepare` only")
    target = folder / f"input-{number}"
    if target.exists():
        raise DataError(f"{title}: given twice")
    if path is None and sys.stdin is None:
        raise DataError("standard input is closed")
    with nullcontext(sys.stdin.buffer) if path is None else path.open("rb") as pipe:
        _copy(pipe, target)
    notes.lines.append(f"{title}: read to its end, {size_on_disk(target):,} bytes kept for the time being in {folder}")
    return CorpusFile(target, number, True, title=title)


def _copy(pipe: BinaryIO, target: Path) -> None:
    """Write the content of a pipe to a file, compressed unless it is already."""
    head = pipe.read(HEAD)
    with target.open("wb") as out:
        if compression_of(head) or begins_table(head):
            out.write(head)
            shutil.copyfileobj(pipe, out)
        else:
            with zstandard.ZstdCompressor(level=1).stream_writer(out, closefd=False) as packed:
                packed.write(head)
                shutil.copyfileobj(pipe, packed)


def _stdlib_files() -> Iterator[Path]:
    """Python files of the standard library, without its test suites and without installed packages."""
    return (file for file in _walk(stdlib_folder(), Notes(), _STDLIB_LEFT_OUT) if file.suffix == ".py")


def _walk(root: Path, notes: Notes, left_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Regular files below a folder, each folder's own before its subfolders', sorted by name. Raises DataError."""

    def unreadable(error: OSError) -> None:
        if error.filename == str(root):
            raise DataError(f"{shown(root)}: cannot be read: {error.strerror}") from error
        notes.left_out["because they cannot be read"].append(f"{shown(error.filename)} ({error.strerror})")

    for folder, names, files in os.walk(root, onerror=unreadable):
        if (splits := saved_splits(Path(folder))) is not None:
            names.clear()
            notes.lines.append(f"{shown(folder)}: saved by `datasets`, with {', '.join(splits)}; all of it is read")
            yield from (file for split in splits.values() for file in split)
            continue
        for name in [*files, *names]:
            if name.startswith(".") or name == "__pycache__":
                notes.left_out["because hidden"].append(shown(Path(folder, name)))
        names[:] = sorted(n for n in names if not n.startswith(".") and n != "__pycache__" and n not in left_out)
        for name in names:
            if Path(folder, name).is_symlink():
                notes.left_out["because links to folders are not followed"].append(shown(Path(folder, name)))
        for name in sorted(files):
            if not name.startswith(".") and _is_file(Path(folder, name), notes):
                yield Path(folder, name)


def _is_file(path: Path, notes: Notes) -> bool:
    """Whether it is a regular file; anything else is noted."""
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
        reason = "because they are pipes, sockets or devices"
    except FileNotFoundError:
        regular, reason = False, "because they are links to nothing"
    except OSError as error:
        regular, reason = False, f"because they cannot be read ({error.strerror})"
    if not regular:
        notes.left_out[reason].append(shown(path))
    return regular


def _some(names: list[str]) -> str:
    """The first few of many names."""
    more = len(names) - _EXAMPLES
    return ", ".join(names[:_EXAMPLES]) + (f" and {more:,} more" if more > 0 else "")
