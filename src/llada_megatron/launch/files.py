"""Writing small files that other processes, also on other machines, read or create at the same time."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def make_once(path: Path, text: str) -> bool:
    """Create a file with its whole content at once; returns False where there is one already, which is not changed.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = aside(path)
    try:
        temporary.write_text(text, "utf-8")
        link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def replace(path: Path, text: str) -> None:
    """Write a file such that a reader finds either the whole old or the whole new content.

    Raises:
        OSError: the file cannot be written; an old one is not changed.
    """
    temporary = aside(path)
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """Make a hard link `target` to `source`, or a copy where the storage has no hard links; never replaces a file.

    Raises:
        FileExistsError: `target` exists.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with target.open("x", encoding="utf-8") as stream:
            stream.write(source.read_text("utf-8"))


def aside(path: Path) -> Path:
    """A hidden, unique name for a temporary file beside `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")
