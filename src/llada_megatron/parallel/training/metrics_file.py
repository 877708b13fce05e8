"""Reading metrics.jsonl, while its run goes on or after it; without torch, so that a command answers at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILE_NAME = "metrics.jsonl"

EXPERTS_FILE_NAME = "experts.jsonl"
"""Beside it in a run of a MoE model: tokens per layer, mask ratio and expert, a line an interval."""

_TAIL_BYTES = 64 * 2**10


def read_metrics(run_dir: Path | str, name: str = FILE_NAME) -> list[dict[str, Any]]:
    """The lines of a run's metrics file; readable while the run goes on (a line being written is left out)."""
    path = Path(run_dir) / name
    if not path.exists():
        return []
    return [line for line in map(parse_line, path.read_text(encoding="utf-8").splitlines()) if line is not None]


def last_metrics(run_dir: Path | str, key: str) -> dict[str, Any]:
    """The newest line that has `key`, from the end of the file only; empty where there is none."""
    try:
        with (Path(run_dir) / FILE_NAME).open("rb") as stream:
            start = max(0, stream.seek(0, 2) - _TAIL_BYTES)
            stream.seek(start)
            text = stream.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return {}
    lines = text.splitlines()[1 if start else 0 :]
    return next((line for line in map(parse_line, reversed(lines)) if line is not None and key in line), {})


def parse_line(text: str | bytes) -> dict[str, Any] | None:
    """One line as its values; None for one that is cut short."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
