"""What `llada prepare` shows while it works, and what it says of a full disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.errors import ResourceError


@contextmanager
def progress(what: str, total: int) -> Iterator[Any]:
    """A bar of bytes read on stderr; nothing where that is no terminal. Yields advance(bytes)."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda size: progress.advance(task, size)


@contextmanager
def no_space(prefix: Path) -> Iterator[None]:
    """A full disk is said in words."""
    import errno

    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{prefix.parent}: the disk is full; free space or choose another --output") from error
        raise
