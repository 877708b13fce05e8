"""Whether the files that are being converted stay as they are."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path

from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.tools.convert.plans import changes
from llada_megatron.tools.convert.workspace import Workspace

FILES = "source's files"
"""Their key in a plan."""


def file_states(paths: Iterable[Path]) -> dict[str, str]:
    """By name what shows that a file has changed: its size, and when it was written (UTC)."""
    states = {}
    for path in paths:
        found = path.stat()
        seconds, rest = divmod(found.st_mtime_ns, 10**9)
        date = datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
        states[path.name] = f"{found.st_size:,} bytes of {date}.{rest:09}"
    return states


def require_unchanged(workspace: Workspace, paths: Iterable[Path]) -> None:
    """Raises: CheckpointError: one of the source's files was written since the conversion began."""
    try:
        now = file_states(paths)
    except OSError as error:
        raise CheckpointError(f"{error.filename} went away while it was converted ({error.strerror})") from error
    before = workspace.plan[FILES]
    if before != now:
        raise CheckpointError(
            f"the source changed while it was converted ({changes(before, now)}), and the output may be of either: "
            f"wait until nothing writes there, remove {workspace.root}, and repeat the command"
        )
