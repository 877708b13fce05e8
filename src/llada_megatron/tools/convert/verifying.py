"""Whether two checkpoints hold the same model: every tensor, then the logits of both on a text."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from llada_megatron.llada_moe.config.architecture import architecture
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.huggingface.weights import Unit, units
from llada_megatron.tools.convert.opening import Source

_SHOWN = 5
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_AHEAD = 4  # units compared beyond the one that is waited for, per worker
ROUNDING = 1e-6
"""Of the largest logit: a float32 product of equal matrices may differ by it, with where they lie in memory."""
NOT_COMPARED = ("family", "mask_token_id", "eos_token_id", "max_sequence_length")
"""Keys of a model that say nothing of how a text becomes logits."""


@dataclass(frozen=True)
class Difference:
    """Where two tensors differ, and by how much."""

    unit: Unit
    position: tuple[int, ...]
    """Of the first difference, in the whole weight."""
    values: tuple[float, float]
    """There, of either."""
    largest: float
    """Absolute difference over the unit; not a number where only one of two values is a number."""
    dtypes: tuple[torch.dtype, torch.dtype]

    def __str__(self) -> str:
        a, b = self.values
        kinds = "" if self.dtypes[0] == self.dtypes[1] else f" ({self.dtypes[0]} and {self.dtypes[1]})"
        return f"{self.unit.name}{kinds} at {list(self.position)}: {a:.9g} and {b:.9g}; largest {self.largest:.3g}"


def require_same_architecture(a: Source, b: Source) -> None:
    """Raises: CheckpointError: the models differ, so that no tensor can be compared with another."""
    one, other = architecture(a.model), architecture(b.model)
    keys = [key for key in one | other if key not in NOT_COMPARED and one.get(key) != other.get(key)]
    differing = [f"{key}: {one.get(key)} and {other.get(key)}" for key in keys]
    if differing:
        raise CheckpointError(f"{a.directory} and {b.directory} hold different models: {'; '.join(differing)}")


def verify(a: Source, b: Source, tolerance: float, workers: int, text: str | None, logits: bool) -> dict[str, Any]:
    """Compare two checkpoints.

    Args:
        tolerance: see `differences`.
        text: for the logits; None = a few sentences.
        logits: whether to compare those as well.

    Returns:
        JSON values: whether they are `equal`, `tensors` compared and `differing`, and `lines` that say it to people.

    Raises:
        CheckpointError: one is not whole, or they are of different models.
    """
    require_same_architecture(a, b)
    for source in (a, b):
        source.require_whole()
    found = list(differences(a, b, tolerance, workers))
    differing = [each for each in found if each is not None]
    measure = "bit for bit" if tolerance == 0 else f"within {tolerance:g}"
    lines = [f"tensors: {len(found) - len(differing):,} of {len(found):,} are equal {measure}"]
    if differing:
        lines += [f"first difference: {differing[0]}", *(f"then: {each}" for each in differing[1:_SHOWN])]
    result = {"equal": not differing, "tensors": len(found), "differing": len(differing), "lines": lines}
    if logits:
        lines.append(_logits_line(a, b, text, tolerance))
    return result


def _logits_line(a: Source, b: Source, text: str | None, tolerance: float) -> str:
    """How the logits of both compare."""
    from llada_megatron.tools.convert.logits import TEXT, logits, missing_memory, token_ids

    obstacle = missing_memory(a.model)
    if obstacle:
        return f"logits: not compared: {obstacle}"
    tokens, how = token_ids(a, b, text or TEXT)
    if (a.objective.kind, a.objective.block_size) != (b.objective.kind, b.objective.block_size):
        how += f", both with the attention of {a.directory}"
    one, other = (logits(source, a.objective, tokens) for source in (a, b))
    apart, reach = (one - other).abs().amax(dim=1), float(one.abs().max())
    differing = (~(apart <= max(tolerance, ROUNDING * reach))).nonzero()
    if len(differing) == 0:
        return f"logits: equal on {how} (largest difference {float(apart.max()):.2g}, logits reach {reach:.3g})"
    first = int(differing[0])
    return (
        f"logits: on {how} they differ by up to {float(apart.max()):.3g}, first at position {first} (token "
        f"{int(tokens[0, first])}, by {float(apart[first]):.3g}); logits reach {reach:.3g}"
    )


def differences(a: Source, b: Source, tolerance: float, workers: int) -> Iterator[Difference | None]:
    """For every unit in the order of the forward pass: how it differs, or None where it does not.

    Args:
        tolerance: largest absolute difference that counts as equal; 0 asks for equal dtypes and equal bits.
    """
    waiting = iter(units(a.model))
    with ThreadPoolExecutor(max_workers=workers) as pool:

        def start(unit: Unit) -> Any:
            return pool.submit(difference, a, b, unit, tolerance)

        running = [start(unit) for unit in islice(waiting, _AHEAD * workers)]
        while running:
            yield running.pop(0).result()
            running += [start(unit) for unit in islice(waiting, 1)]


def difference(a: Source, b: Source, unit: Unit, tolerance: float) -> Difference | None:
    """How one unit differs, or None."""
    one, other = a.read(unit), b.read(unit)
    if tolerance == 0 and one.dtype == other.dtype:
        bits = _BITS[one.itemsize]
        differing = one.view(bits) != other.view(bits)
    elif tolerance == 0:
        differing = torch.ones_like(one, dtype=torch.bool)
    else:
        differing = ~((one.double() - other.double()).abs() <= tolerance)
    if not differing.any():
        return None
    first = int(differing.reshape(-1).int().argmax())
    place = [int(index) for index in torch.unravel_index(torch.tensor(first), one.shape)]
    place[0] += unit.start
    values = float(one.reshape(-1)[first]), float(other.reshape(-1)[first])
    largest = float((one.double() - other.double()).abs().max())
    return Difference(unit, (*unit.index, *place), values, largest, (one.dtype, other.dtype))
