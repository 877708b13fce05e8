"""`llada bench likelihood`: how far estimates of a likelihood are off, and how often they choose the right option.

No model is run: a question is a random table that holds log p of every position under every set of masks, so that the
exact bound is a sum. Masks are those that `llada eval likelihood` draws.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llada_megatron.tools.bench import Claim, at_least, at_most, reported

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LENGTH, OPTIONS = 12, 4
_GAIN_GOAL = 0.05
"""By which share of the questions sharing must raise the agreement with the exact verdict, with one sample."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The size of the problem."""
    parser.add_argument("--questions", type=int, default=400, help="random tables (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the tables (default %(default)s)")


@dataclass(frozen=True)
class _Table:
    """One question: for each option and set of masks what one sample says, `[options, 2 ** length]`, and the bound."""

    samples: NDArray[np.float64]
    exact: NDArray[np.float64]


def run(args: argparse.Namespace) -> list[Claim]:
    """Agreement with the exact verdict, and the error, with masks shared and independent."""
    import numpy as np

    generator = np.random.default_rng(args.seed)
    tables = [_table(generator) for _ in range(args.questions)]
    claims: list[Claim] = []
    gains = {}
    for count in (1, 8, 32):
        right = {shared: _agreement(tables, count, shared) for shared in (False, True)}
        gains[count] = right[True] - right[False]
        for shared, share in right.items():
            masks = "shared by the options" if shared else "drawn for each option"
            claims.append(reported(f"verdict is the exact one, {count} samples, masks {masks}", 100 * share, "%"))
    claims.append(at_least("gain of shared masks with one sample", 100 * gains[1], "points", 100 * _GAIN_GOAL))
    errors = [_error(tables, count) for count in (8, 32, 128)]
    for before, after in itertools.pairwise(errors):
        claims.append(at_least("error falls, for four times the samples, by the factor", before / after, "", 1.7))
    z = _bias(tables)
    claims.append(at_most("distance of the mean estimate from the exact bound", abs(z), "standard errors", 4.0))
    return claims


def _table(generator: np.random.Generator) -> _Table:
    """Costs as in the notes of this project: exponential, and the higher the more is masked."""
    import numpy as np

    sets = np.arange(1 << LENGTH)
    masked = (sets[:, None] >> np.arange(LENGTH)) & 1
    size = masked.sum(1)
    log_p = -generator.exponential(1.0, (OPTIONS, 1 << LENGTH, LENGTH)) * (0.3 + size / LENGTH)[:, None]
    samples = (log_p * masked).sum(2) * LENGTH / np.maximum(size, 1)
    exact = np.mean([samples[:, size == count].mean(1) for count in range(1, LENGTH + 1)], axis=0)
    return _Table(samples, exact)


def _estimates(table: _Table, number: int, count: int, shared: bool) -> NDArray[np.float64]:
    """What `count` samples say of each option `[options]`."""
    import numpy as np

    from llada_megatron.llada_moe.evaluation.estimators import draw
    from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
    from llada_megatron.llada_moe.evaluation.queries import Pair, parts

    protocol = LikelihoodProtocol(samples=count, stratum=min(8, count), shared_masks=shared)

    def masks(option: int) -> Sequence[int]:
        pair = Pair((), (0,) * LENGTH, number, option)
        strata = draw(parts(pair, None)[0], pair, 0, protocol)
        return [sum(1 << position for position in drawn) for stratum in strata for drawn in stratum]

    drawn = [masks(0)] * OPTIONS if shared else [masks(option) for option in range(OPTIONS)]
    return np.array([table.samples[option, sets].mean() for option, sets in enumerate(drawn)])


def _agreement(tables: Sequence[_Table], count: int, shared: bool) -> float:
    same = [
        int(_estimates(table, number, count, shared).argmax() == table.exact.argmax())
        for number, table in enumerate(tables)
    ]
    return sum(same) / len(same)


def _error(tables: Sequence[_Table], count: int) -> float:
    """Root mean square of the distance from the exact bound."""
    import numpy as np

    return float(np.sqrt(np.mean([(_estimates(t, n, count, True) - t.exact) ** 2 for n, t in enumerate(tables)])))


def _bias(tables: Sequence[_Table]) -> float:
    """Mean distance of one option's estimate from the exact bound, in its standard errors."""
    import numpy as np

    found = np.array([(_estimates(t, n, 8, True) - t.exact)[0] for n, t in enumerate(tables)])
    return float(found.mean() / (found.std(ddof=1) / np.sqrt(len(found))))
