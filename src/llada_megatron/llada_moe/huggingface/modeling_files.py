"""The modelling files that an export carries. They run in the reader's Python, never in this package."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).parent / "modeling"


def modeling_files(folder: str) -> list[Path]:
    """The files of the format whose own are in `modeling/<folder>`, and the one that all formats share."""
    return sorted([*(_ROOT / folder).glob("*.py"), *(_ROOT / "common").glob("*.py")])
