"""Output of the commands: results go to stdout, messages for people to stderr."""

from __future__ import annotations

import json
import os
import sys
from typing import Any, TextIO

RED = "31"

_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
_CONTROL |= dict.fromkeys(range(0x80, 0xA0), "\ufffd")
"""Control characters, also those of eight bits, and the visible characters that stand for them."""


def message(text: str) -> None:
    """Print a message for people (stderr)."""
    print(text, file=sys.stderr, flush=True)


def error(text: str) -> None:
    """Print an error message (stderr)."""
    message(f"{coloured('error:', RED, sys.stderr)} {visible(text)}")


def emit_json(value: Any) -> None:
    """Print a JSON object as one line of stdout; a command calls this last."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def coloured(text: str, code: str, stream: TextIO) -> str:
    """The text in an ANSI colour where `stream` is a terminal and NO_COLOR (no-color.org) is not set, else as it is."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\033[{code}m{text}\033[0m"


def visible(text: str) -> str:
    """A text with its control characters made visible, so that it cannot control the terminal."""
    return text.translate(_CONTROL)


def count_text(count: float) -> str:
    """A number of things as text for people: `3.03 M`, `2.3 T`, `512`."""
    return _scaled(count, (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)), "")


def rate_text(flops: float) -> str:
    """Operations per second as text for people: `134 GFLOP/s`."""
    return _scaled(flops, (("P", 10**15), ("T", 10**12), ("G", 10**9), ("M", 10**6)), "FLOP/s")


def _scaled(value: float, prefixes: tuple[tuple[str, int], ...], unit: str) -> str:
    """A value to three figures with the prefix that leaves it at least 1."""
    prefix, size = next(((prefix, size) for prefix, size in prefixes if value >= size), ("", 1))
    return f"{float(f'{value / size:.3g}'):g} {prefix}{unit}".rstrip()


def size_text(count: float) -> str:
    """A number of bytes as text for people: `1.44 TB`, `9.57 GB`, `72 KB`."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if count >= size:
            return f"{float(f'{count / size:.3g}'):g} {unit}"
    return f"{count:.0f} bytes"
