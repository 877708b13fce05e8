"""Small files that other processes, also of other machines, read or want to make at the same time."""

from __future__ import annotations

import errno
import os
import uuid
from pathlib import Path

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def make_once(path: Path, text: str) -> bool:
    """Make a file, whole; False where there is one already, which stays as it is.

    Raises:
        OSError: it cannot be written.
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
    """Write a file so that whoever reads it finds it whole, as it was or as it is now.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    temporary = aside(path)
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def link(source: Path, target: Path) -> None:
    """Give a file a second name, or its content one where the storage has no hard links; never replaces a file.

    Raises:
        FileExistsError: `target` is there.
    """
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with target.open("x", encoding="utf-8") as stream:
            stream.write(source.read_text("utf-8"))


def aside(path: Path) -> Path:
    """A hidden name beside `path` that nobody else uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")
