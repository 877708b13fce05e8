"""Small files that several processes, also of several machines, may want to make at the same time."""

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
