"""Whether two checkpoints give the same logits on a text."""

from __future__ import annotations

import math
from typing import Any

import torch

from llada_megatron.tools.convert.logits import logits, missing_memory, token_ids
from llada_megatron.tools.convert.opening import Source, stored_bytes
from llada_megatron.tools.convert.tasks import progress_bar

ROUNDING = 1e-6
"""Of the largest logit: a float32 product of equal matrices may differ by it, with where they lie in memory."""


def compare_logits(a: Source, b: Source, text: str | None, tolerance: float) -> dict[str, Any]:
    """How the logits of both compare.

    Args:
        text: None = a few sentences.
        tolerance: largest absolute difference that counts as equal, beside that of rounding.

    Returns:
        JSON values: whether they were `compared`, or else why `not_compared`; whether they are `equal`; the `largest`
        difference, null where only one of two is a number; the `first_position` that differs, its `token`, and
        `apart_there`; what the logits of the first `reach`; what they were computed `on`.
    """
    obstacle = missing_memory(a.model)
    if obstacle:
        unknown = dict.fromkeys(("equal", "largest", "first_position", "token", "apart_there", "reach", "on"))
        return {"compared": False, "not_compared": obstacle, **unknown}
    tokens, how = token_ids(a, b, text)
    if (a.objective.kind, a.objective.block_size) != (b.objective.kind, b.objective.block_size):
        how += f", both with the attention of {a.directory}"
    with progress_bar("logits", stored_bytes(a) + stored_bytes(b)) as show:
        one, other = (logits(source, a.objective, tokens, show) for source in (a, b))
    same = (one == other) | (one.isnan() & other.isnan())
    apart = torch.where(same, 0.0, (one - other).abs()).amax(dim=1)
    reach = float(one[one.isfinite()].abs().max()) if one.isfinite().any() else 0.0
    differing = (~(apart <= max(tolerance, ROUNDING * reach))).nonzero()
    first = int(differing[0]) if len(differing) else None
    return {
        "compared": True,
        "not_compared": None,
        "equal": first is None,
        "largest": _number(float(apart.max())),
        "first_position": first,
        "token": None if first is None else int(tokens[0, first]),
        "apart_there": None if first is None else _number(float(apart[first])),
        "reach": reach,
        "on": how,
    }


def as_line(found: dict[str, Any]) -> str:
    """The same for people."""
    if not found["compared"]:
        return f"logits: not compared: {found['not_compared']}"
    largest, reach = _words(found["largest"]), f"logits reach {found['reach']:.3g}"
    if found["equal"]:
        return f"logits: equal on {found['on']} (largest difference {largest}, {reach})"
    return (
        f"logits: on {found['on']} they differ by up to {largest}, first at position {found['first_position']} (token "
        f"{found['token']}, by {_words(found['apart_there'])}); {reach}"
    )


def _number(value: float) -> float | None:
    """JSON has no others."""
    return value if math.isfinite(value) else None


def _words(value: float | None) -> str:
    return "nan" if value is None else f"{value:.3g}"
