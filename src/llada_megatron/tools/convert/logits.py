"""The logits of a checkpoint of either kind on a text, computed by our model in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from llada_megatron.llada_moe.config.schema import ModelConfig, ObjectiveConfig
from llada_megatron.llada_moe.data.tokenizer_files import load_tokenizer
from llada_megatron.llada_moe.errors import LladaError
from llada_megatron.llada_moe.huggingface.weights import Unit, units
from llada_megatron.llada_moe.model.parameters import count_parameters
from llada_megatron.parallel import device
from llada_megatron.tools.convert.opening import Source, unit_bytes

TEXT = """\
It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. \
学而时习之，不亦说乎？ def gcd(a, b): return a if b == 0 else gcd(b, a % b)  # 1071 and 462 have 21.
"""
"""Dickens, Confucius, Euclid: words, another script, code and numbers."""
_MASKED_EVERY = 6
_LONGEST = 256


def missing_memory(model: ModelConfig) -> str | None:
    """Why the model cannot be run on this machine, or None."""
    needed, free = 4 * count_parameters(model).total, psutil.virtual_memory().available
    if needed * 1.1 > free:
        return f"in float32 the model takes {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free"
    return None


def token_ids(a: Source, b: Source, text: str | None) -> tuple[torch.Tensor, str]:
    """`[1, seq]` ids of the text, every sixth masked for a model of masks; and what they are.

    Args:
        text: None = a few sentences.
    """
    ids, how = _encode(a, b, text)
    tokens = torch.tensor([ids[: min(_LONGEST, a.model.max_sequence_length)]])
    if a.objective.kind == "diffusion":
        tokens[0, _MASKED_EVERY // 2 :: _MASKED_EVERY] = a.model.mask_token_id
    return tokens, how


def logits(
    source: Source, objective: ObjectiveConfig, tokens: torch.Tensor, show: Callable[[int], object]
) -> torch.Tensor:
    """Logits `[seq, vocab]` of `tokens` `[1, seq]`, float32, with the attention of `objective`.

    Args:
        show: told how many bytes of weights were read.
    """
    device.install()
    from llada_megatron.parallel.inference import open_weights

    by_place: dict[tuple[str, tuple[int, ...]], list[Unit]] = {}
    for unit in units(source.model):
        by_place.setdefault((unit.weight.key, unit.index), []).append(unit)
    met: set[tuple[str, tuple[int, ...]]] = set()

    def read(key: str, index: tuple[int, ...]) -> torch.Tensor:
        blocks = by_place[key, index]
        if (key, index) not in met:  # gate and up are asked for one after the other
            met.add((key, index))
            show(sum(unit_bytes(source, unit) for unit in blocks))
        return torch.cat([source.read(unit, torch.float32) for unit in blocks])

    with open_weights(source.model, objective, read) as model:
        rows = torch.ones_like(tokens, dtype=torch.bool)
        boundaries = torch.tensor([0, tokens.numel()], dtype=torch.int32)
        with torch.no_grad():
            return model(tokens, boundaries, rows=rows).float()


def _encode(a: Source, b: Source, text: str | None) -> tuple[list[int], str]:
    """Ids, and in words what they are."""
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
    """Of the text, or why there are none."""
    try:
        ids = load_tokenizer(tokenizer).encode(text)
    except LladaError as error:
        return f"the tokenizer cannot be used: {error}"
    if not ids:
        return f"the tokenizer of {tokenizer} finds no token in the text"
    if max(ids) >= vocabulary:
        return f"the tokenizer of {tokenizer} gives id {max(ids)}, beyond the vocabulary of {vocabulary}"
    return ids
