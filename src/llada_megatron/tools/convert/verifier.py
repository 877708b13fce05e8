"""Whether two checkpoints hold the same model: every tensor, then the logits of both on a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from llada_megatron.llada_moe.config.model import architecture
from llada_megatron.llada_moe.errors import CheckpointError
from llada_megatron.llada_moe.finite import is_finite
from llada_megatron.llada_moe.huggingface.weights import Unit, units
from llada_megatron.tools.convert.source import CheckpointSource, stored_bytes, unit_bytes
from llada_megatron.tools.convert.tasks import progress_bar

_SHOWN = 5

_CHUNK = 4 * 2**20
"""Elements compared at once: the comparison takes ten times their memory."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_AHEAD = 4  # units that are submitted at a time, per worker

NOT_COMPARED = (
    "family",
    "mask_token_id",
    "eos_token_id",
    "delete_token_id",
    "insert_token_id",
    "max_sequence_length",
)
"""Keys of a model that have no effect on the logits of a text."""


@dataclass(frozen=True)
class Difference:
    """Where the tensors of a unit differ, and by how much."""

    unit: Unit
    position: tuple[int, ...]
    """Position of the first difference in the whole weight."""
    values: tuple[float, float]
    """The two values there."""
    largest: float
    """Largest absolute difference over the unit; NaN if only one of two values is NaN."""
    dtypes: tuple[torch.dtype, torch.dtype]
    tolerated: bool = False
    """Whether no difference exceeds the tolerance."""

    def __str__(self) -> str:
        a, b = self.values
        kinds = "" if self.dtypes[0] == self.dtypes[1] else f" ({self.dtypes[0]} and {self.dtypes[1]})"
        return f"{self.unit.name}{kinds} at {list(self.position)}: {a:.9g} and {b:.9g}; largest {self.largest:.3g}"


@dataclass(frozen=True)
class ComparedUnit:
    """A unit of both checkpoints."""

    difference: Difference | None
    """None if the bits are the same."""
    not_finite: tuple[str, ...] = ()
    """The first NaN or infinity of each checkpoint that has one: directory, tensor, position and value."""


def require_same_architecture(a: CheckpointSource, b: CheckpointSource) -> None:
    """Raises CheckpointError: the models differ, so that their tensors cannot be compared."""
    one, other = architecture(a.model), architecture(b.model)
    keys = [key for key in one | other if key not in NOT_COMPARED and one.get(key) != other.get(key)]
    differing = [f"{key}: {one.get(key)} and {other.get(key)}" for key in keys]
    if differing:
        raise CheckpointError(f"{a.directory} and {b.directory} hold different models: {'; '.join(differing)}")


def verify(
    a: CheckpointSource, b: CheckpointSource, tolerance: float, workers: int, text: str | None, logits: bool
) -> dict[str, Any]:
    """Compare two checkpoints.

    Args:
        tolerance: largest absolute difference that counts as equal; 0 asks for equal dtypes and equal bits.
        workers: number of threads.
        text: text whose logits are compared; None = a few sentences.
        logits: whether to compare logits as well.

    Returns:
        JSON values: whether they are `equal`; the number of `tensors` compared, of `differing` and of `identical` ones;
        under `not_finite` the first NaN or infinity of each tensor that has one; under `logits` the result of
        `compare_logits`, or null; and the same as text in `lines`. Checkpoints with such weights are not equal, not
        even to themselves: a comparison that meets NaN fails.

    Raises:
        CheckpointError: one is not whole, or they are of different models.
    """
    require_same_architecture(a, b)
    for source in (a, b):
        source.require_whole()
    with progress_bar("comparing", stored_bytes(a) + stored_bytes(b)) as show:
        compared = list(differences(a, b, tolerance, workers, show))
    found = [each.difference for each in compared]
    differing = [each for each in found if each is not None and not each.tolerated]
    not_finite = [place for each in compared for place in each.not_finite]
    identical = found.count(None)
    result = {
        "equal": not differing and not not_finite,
        "tensors": len(found),
        "differing": len(differing),
        "identical": identical,
        "not_finite": not_finite,
        "logits": None,
        "lines": [*_lines(len(found), identical, differing, tolerance), *_lines_not_finite(not_finite)],
    }
    if logits:
        _add_logits(result, a, b, text, tolerance)
    return result


def _add_logits(
    result: dict[str, Any], a: CheckpointSource, b: CheckpointSource, text: str | None, tolerance: float
) -> None:
    """Compare the logits as well; if they differ although all tensors are identical, the checkpoints are not equal."""
    from llada_megatron.tools.convert.logits import as_line, compare_logits

    found = result["logits"] = compare_logits(a, b, text, tolerance)
    result["lines"].append(as_line(found))
    if found["equal"] is not False:
        return
    if found["not_finite"]:
        result["equal"] = False
        return
    if result["identical"] == result["tensors"]:
        result["equal"] = False
        result["lines"].append("not equal: the same tensors give other logits")
    elif result["equal"]:
        result["lines"].append("equal within the tolerance for tensors, by which this is judged; the logits are not")


def _lines(count: int, identical: int, differing: list[Difference], tolerance: float) -> Iterator[str]:
    """How the tensors compare, as lines of text."""
    measure = "bit for bit" if tolerance == 0 else f"within {tolerance:g} ({identical:,} bit for bit)"
    yield f"tensors: {count - len(differing):,} of {count:,} are equal {measure}"
    for label, each in zip(("first difference", *["then"] * (_SHOWN - 1)), differing, strict=False):
        yield f"{label}: {each}"


def _lines_not_finite(places: list[str]) -> Iterator[str]:
    if places:
        more = f" (and {len(places) - _SHOWN} more)" if len(places) > _SHOWN else ""
        yield f"not equal: not every weight is a finite number: {'; '.join(places[:_SHOWN])}{more}"


def differences(
    a: CheckpointSource,
    b: CheckpointSource,
    tolerance: float,
    workers: int,
    show: Callable[[int], object] = lambda count: None,
) -> Iterator[ComparedUnit]:
    """How each unit compares, in the order of the forward pass.

    Args:
        tolerance: largest absolute difference that counts as equal; 0 asks for equal dtypes and equal bits.
        show: called with the bytes of each unit once it is compared.
    """
    waiting = iter(units(a.model))
    pool = ThreadPoolExecutor(max_workers=workers)

    def start(unit: Unit) -> Future[ComparedUnit]:
        return pool.submit(compare_unit, a, b, unit, tolerance)

    try:
        running = [(unit, start(unit)) for unit in islice(waiting, _AHEAD * workers)]
        while running:
            unit, compared = running.pop(0)
            yield compared.result()
            show(unit_bytes(a, unit) + unit_bytes(b, unit))
            running += [(unit, start(unit)) for unit in islice(waiting, 1)]
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or an interruption, units that wait are not compared


def compare_unit(a: CheckpointSource, b: CheckpointSource, unit: Unit, tolerance: float) -> ComparedUnit:
    """How one unit compares; arguments as for `differences`."""
    one, other = a.read(unit), b.read(unit)
    places = [
        f"{source.directory}: {source.not_finite(unit)}"
        for source, tensor in ((a, one), (b, other))
        if not is_finite(tensor)
    ]
    return ComparedUnit(difference(one, other, unit, tolerance), tuple(places))


def difference(one: torch.Tensor, other: torch.Tensor, unit: Unit, tolerance: float) -> Difference | None:
    """How the two tensors of a unit differ, or None if the bits are the same; `tolerance` as for `differences`."""
    one, other = one.reshape(-1), other.reshape(-1)
    same_dtype = one.dtype == other.dtype
    largest, beyond, unequal = torch.tensor(0.0, dtype=torch.float64), None, None
    for start, x, y in zip(range(0, len(one), _CHUNK), one.split(_CHUNK), other.split(_CHUNK), strict=True):
        differing = x.view(_BITS[x.itemsize]) != y.view(_BITS[y.itemsize]) if same_dtype else torch.ones_like(x).bool()
        if not differing.any():
            continue
        x, y = x.double(), y.double()
        apart = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, (x - y).abs_())
        largest = torch.maximum(largest, apart.max())  # NaN if one of the two is NaN
        if unequal is None:
            unequal = start + int(differing.int().argmax())
        if beyond is None and (tolerance == 0 or not apart.max() <= tolerance):
            beyond = start + int((differing if tolerance == 0 else ~(apart <= tolerance)).int().argmax())
    if unequal is None:
        return None
    first = unequal if beyond is None else beyond
    position = [int(index) for index in torch.unravel_index(torch.tensor(first), unit.shape)]
    position[0] += unit.start
    values = float(one[first]), float(other[first])
    dtypes = one.dtype, other.dtype
    return Difference(unit, (*unit.index, *position), values, float(largest), dtypes, tolerated=beyond is None)
