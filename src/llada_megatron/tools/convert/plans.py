"""What decides the bytes of a conversion's output, as JSON values, and how two such plans differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llada_megatron.llada_moe.errors import CheckpointError

_MOST_CHANGES = 6
_MOST_CHARACTERS = 100


def read_json(path: Path) -> Any:
    """The content of a file of a workspace, or None where there is none. Raises CheckpointError: it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}): remove {path.parent} to convert anew") from None


def changes(known: dict[str, Any], plan: dict[str, Any]) -> str:
    """The keys in which two plans differ, each with its value in `known` and in `plan`."""
    before, after = dict(_leaves(known)), dict(_leaves(plan))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    found = [f"{key}: {_text(before.get(key))} -> {_text(after.get(key))}" for key in keys[:_MOST_CHANGES]]
    more = f" (and {len(keys) - _MOST_CHANGES} more)" if len(keys) > _MOST_CHANGES else ""
    return "; ".join(found) + more


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = f"{prefix}, {key}" if prefix else key
        if isinstance(value, dict):
            yield from _leaves(value, name)
        else:
            yield name, value


def _text(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
