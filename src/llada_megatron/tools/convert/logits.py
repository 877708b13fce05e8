"""The logits of two checkpoints on a text, computed by this project's model in float32, and how they compare."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from llada_megatron.llada_moe.config.model import ModelConfig
from llada_megatron.llada_moe.config.objective import ObjectiveConfig
from llada_megatron.llada_moe.data.tokenizer_files import load_tokenizer
from llada_megatron.llada_moe.errors import LladaError
from llada_megatron.llada_moe.finite import is_finite
from llada_megatron.llada_moe.huggingface.weights import Unit, units
from llada_megatron.llada_moe.model.parameters import count_parameters
from llada_megatron.llada_moe.objectives import make_objective
from llada_megatron.parallel import device
from llada_megatron.tools.convert.source import CheckpointSource, stored_bytes, unit_bytes
from llada_megatron.tools.convert.tasks import progress_bar

TEXT = """\
It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. \
学而时习之，不亦说乎？ def gcd(a, b): return a if b == 0 else gcd(b, a % b)  # 1071 and 462 have 21.
"""
"""English, another script, code and numbers (Dickens, Confucius, Euclid's algorithm)."""

_MASKED_EVERY = 6
"""Every so many tokens of the text are masked for one."""

_LONGEST = 256
"""Most tokens of the text."""


def missing_memory(model: ModelConfig) -> str | None:
    """Why the model cannot be run in the free memory of this machine, or None if it can."""
    needed, free = 4 * count_parameters(model).total, psutil.virtual_memory().available
    if needed * 1.1 > free:
        return f"in float32 the model takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free"
    return None


def token_ids(a: CheckpointSource, b: CheckpointSource, text: str | None) -> tuple[torch.Tensor, str]:
    """Token ids of the text, `[1, seq]`, every sixth masked for a diffusion model; and what they are, in words.

    Args:
        text: None = a few sentences.
    """
    ids, how = _encode(a, b, text)
    tokens = torch.tensor([ids[: min(_LONGEST, a.model.max_sequence_length)]])
    if make_objective(a.objective).fills_masks:
        tokens[0, _MASKED_EVERY // 2 :: _MASKED_EVERY] = a.model.mask_token_id
    return tokens, how


def logits(
    source: CheckpointSource, objective: ObjectiveConfig, tokens: torch.Tensor, show: Callable[[int], object]
) -> torch.Tensor:
    """Logits `[seq, vocab]` of `tokens` `[1, seq]`, float32, with the attention of `objective`.

    Args:
        show: called with the bytes of each weight that is read.
    """
    device.install()
    from llada_megatron.parallel.checkpoint.loaded_model import open_weights

    by_weight: dict[tuple[str, tuple[int, ...]], list[Unit]] = {}
    for unit in units(source.model):
        by_weight.setdefault((unit.weight.key, unit.index), []).append(unit)
    counted: set[tuple[str, tuple[int, ...]]] = set()

    def read(key: str, index: tuple[int, ...]) -> torch.Tensor:
        blocks = by_weight[key, index]
        if (key, index) not in counted:  # gate and up are read one after the other
            counted.add((key, index))
            show(sum(unit_bytes(source, unit) for unit in blocks))
        return torch.cat([source.read(unit, torch.float32) for unit in blocks])

    with open_weights(source.model, objective, read) as model:
        rows = torch.ones_like(tokens, dtype=torch.bool)
        boundaries = torch.tensor([0, tokens.numel()], dtype=torch.int32)
        with torch.no_grad():
            return model(tokens, boundaries, rows=rows).float()


def _encode(a: CheckpointSource, b: CheckpointSource, text: str | None) -> tuple[list[int], str]:
    """Ids of the text, or drawn ones if neither tokenizer can be used; and what they are, in words."""
    obstacles = []
    for source in (a, b):
        if source.tokenizer is not None:
            found = _ids(source.tokenizer, text or TEXT, a.model.vocab_size)
            if isinstance(found, list):
                return found, f"{len(found)} tokens of text"
            obstacles.append(found)
    drawn = torch.randint(a.model.vocab_size, (64,), generator=torch.Generator().manual_seed(0)).tolist()
    why = "; ".join(dict.fromkeys(obstacles)) or "neither has a tokenizer"
    instead = "" if text is None else ", not of --text,"
    return drawn, f"{len(drawn)} tokens drawn from the vocabulary{instead} ({why})"


def _ids(tokenizer: Path, text: str, vocabulary: int) -> list[int] | str:
    """Ids of the text, or the reason why this tokenizer gives none."""
    try:
        ids = load_tokenizer(tokenizer).encode(text)
    except LladaError as error:
        return f"the tokenizer cannot be used: {error}"
    if not ids:
        return f"the tokenizer of {tokenizer} finds no token in the text"
    if max(ids) >= vocabulary:
        return f"the tokenizer of {tokenizer} gives id {max(ids)}, beyond the vocabulary of {vocabulary}"
    return ids


ROUNDING = 1e-6
"""Share of the largest logit by which float32 products of equal matrices may differ, depending on their alignment."""


def compare_logits(a: CheckpointSource, b: CheckpointSource, text: str | None, tolerance: float) -> dict[str, Any]:
    """Compare the logits of both checkpoints.

    Args:
        text: None = a few sentences.
        tolerance: largest absolute difference that counts as equal; the error of rounding counts as equal in any case.

    Returns:
        JSON values: whether they were `compared`, or else why `not_compared`; whether they are `equal`, which logits
        that are NaN or infinite never are; `not_finite`, the checkpoints that have such logits; the `largest`
        difference, null if one of the two is not a number; the `first_position` that differs, its `token`, and the
        difference there (`apart_there`); the largest logit of the first (`reach`); what they were computed `on`.
    """
    obstacle = missing_memory(a.model)
    if obstacle:
        unknown = dict.fromkeys(
            ("equal", "not_finite", "largest", "first_position", "token", "apart_there", "reach", "on")
        )
        return {"compared": False, "not_compared": obstacle, **unknown}
    tokens, how = token_ids(a, b, text)
    if (a.objective.kind, a.objective.block_size) != (b.objective.kind, b.objective.block_size):
        how += f", both with the attention of {a.directory}"
    with progress_bar("logits", stored_bytes(a) + stored_bytes(b)) as show:
        one, other = (logits(source, a.objective, tokens, show) for source in (a, b))
    apart = torch.where(one.isfinite() & (one == other), 0.0, (one - other).abs()).amax(dim=1)
    reach = float(one[one.isfinite()].abs().max()) if one.isfinite().any() else 0.0
    differing = (~(apart <= max(tolerance, ROUNDING * reach))).nonzero()
    first = int(differing[0]) if len(differing) else None
    return {
        "compared": True,
        "not_compared": None,
        "equal": first is None,
        "not_finite": [str(source.directory) for source, found in ((a, one), (b, other)) if not is_finite(found)],
        "largest": _number(float(apart.max())),
        "first_position": first,
        "token": None if first is None else int(tokens[0, first]),
        "apart_there": None if first is None else _number(float(apart[first])),
        "reach": reach,
        "on": how,
    }


def as_line(found: dict[str, Any]) -> str:
    """A result of `compare_logits` as a line of text."""
    if not found["compared"]:
        return f"logits: not compared: {found['not_compared']}"
    largest, reach = _text(found["largest"]), f"logits reach {found['reach']:.3g}"
    if found["not_finite"]:
        return (
            f"logits: on {found['on']} not every one is a finite number, first at position {found['first_position']} "
            f"(token {found['token']}), in {' and in '.join(dict.fromkeys(found['not_finite']))}"
        )
    if found["equal"]:
        return f"logits: equal on {found['on']} (largest difference {largest}, {reach})"
    return (
        f"logits: on {found['on']} they differ by up to {largest}, first at position {found['first_position']} (token "
        f"{found['token']}, by {_text(found['apart_there'])}); {reach}"
    )


def _number(value: float) -> float | None:
    """The value, or None if it is not finite, which JSON cannot hold."""
    return value if math.isfinite(value) else None


def _text(value: float | None) -> str:
    return "nan" if value is None else f"{value:.3g}"
