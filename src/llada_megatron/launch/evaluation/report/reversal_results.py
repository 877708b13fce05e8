"""What `llada eval reversal` left behind: right answers by question and model, over seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.errors import DataError
from llada_megatron.llada_moe.evaluation.mean_error import mean_with_error

PROTOCOL_FILE = "protocol.json"


def is_reversal(folder: Path) -> bool:
    """Whether a folder is one of `llada eval reversal --output`."""
    try:
        found = json.loads((folder / PROTOCOL_FILE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("benchmark") == "reversal"


def read_reversal(folder: Path) -> dict[str, Any]:
    """Protocol and rows of a folder; the answers of a model of a seed lie in `seed-N/MODEL.json`.

    Raises:
        DataError: answers that are none.
    """
    protocol = json.loads((folder / PROTOCOL_FILE).read_text("utf-8"))
    shares: dict[tuple[str, str, str], list[float]] = {}
    asked: dict[tuple[str, str, str], int] = {}
    for file in sorted(folder.glob("seed-*/*.json")):
        try:
            answers = json.loads(file.read_text("utf-8"))
            questions = sorted({(each["ask"], each["about"]) for each in answers})
            for ask, about in questions:
                key = file.stem.replace("-", " "), ask, about
                right = [bool(each["right"]) for each in answers if (each["ask"], each["about"]) == (ask, about)]
                shares.setdefault(key, []).append(sum(right) / len(right))
                asked[key] = len(right)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{file}: not the answers of a model of llada eval reversal ({error!r})") from error
    return {"kind": "reversal", "protocol": protocol, "rows": [_row(key, shares[key], asked[key]) for key in shares]}


def _row(key: tuple[str, str, str], shares: Sequence[float], asked: int) -> dict[str, Any]:
    arm, ask, about = key
    return {
        "model": arm,
        "asked": ask,
        "about": about,
        "right": mean_with_error(shares),
        "seeds": len(shares),
        "questions of a seed": asked,
    }
