"""`llada bench likelihood`: how far estimates of a likelihood are off, and how often they choose the right option.

No model is run: a formula says what each token costs under each set of masks, so that the exact bound is a sum. The
masks are those that `llada eval likelihood` draws.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llada_megatron.tools.bench import Claim, at_least, at_most, reported

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LENGTH, OPTIONS = 12, 4
_GAIN_GOAL = 0.10
"""By which share of the questions sharing must raise the agreement with the exact verdict, with one sample."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The size of the problem."""
    parser.add_argument("--questions", type=int, default=400, help="random questions (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the questions (default %(default)s)")


@dataclass(frozen=True)
class _Question:
    """Options of `LENGTH` tokens. With the set S masked, token i of an option has

    log p = -alone[i] (0.3 + |S| / L) + sum over j in S of together[i, j]:

    each token has a difficulty of its own and is harder the more is masked, and so much more so as certain others
    are. Options are drawn independently of each other: that more masks make everything harder is all they share.
    """

    alone: NDArray[np.float64]
    """`[options, length]`, at least 0."""
    together: NDArray[np.float64]
    """`[options, length, length]`."""

    @classmethod
    def drawn(cls, generator: np.random.Generator) -> _Question:
        alone = generator.exponential(1.5, (OPTIONS, LENGTH))
        return cls(alone, generator.normal(0.0, 0.8 / LENGTH, (OPTIONS, LENGTH, LENGTH)))

    def samples(self, masked: NDArray[np.float64]) -> NDArray[np.float64]:
        """What one sample says of each option: `[options, samples]` for masks `[options, samples, length]` of 0, 1."""
        import numpy as np

        count = masked.sum(2)
        alone = np.einsum("ol,osl->os", self.alone, masked) * (0.3 + count / LENGTH)
        together = np.einsum("osl,olk,osk->os", masked, self.together, masked)
        return (together - alone) * LENGTH / count

    @property
    def exact(self) -> NDArray[np.float64]:
        """The bound of each option `[options]`: the mean over 1..L masks of the mean over all sets of so many."""
        import numpy as np

        count = np.arange(1, LENGTH + 1)
        pairs = self.together.sum((1, 2)) - np.einsum("oll->o", self.together)
        alone = self.alone.sum(1) * (0.3 + count[:, None] / LENGTH)
        own = np.einsum("oll->o", self.together)
        return (own + pairs * (count[:, None] - 1) / (LENGTH - 1) - alone).mean(0)


def run(args: argparse.Namespace) -> list[Claim]:
    """Agreement with the exact verdict, and the error, with masks shared and independent."""
    import numpy as np

    generator = np.random.default_rng(args.seed)
    questions = [_Question.drawn(generator) for _ in range(args.questions)]
    claims: list[Claim] = []
    gains = {}
    for count in (1, 8, 32, 128):
        right = {shared: _agreement(questions, count, shared) for shared in (False, True)}
        gains[count] = right[True] - right[False]
        for shared, share in right.items():
            masks = "shared by the options" if shared else "drawn for each option"
            claims.append(reported(f"verdict is the exact one, {count} samples, masks {masks}", 100 * share, "%"))
    claims.append(at_least("gain of shared masks with one sample", 100 * gains[1], "points", 100 * _GAIN_GOAL))
    errors = [_error(questions, count) for count in (8, 32, 128)]
    for before, after in itertools.pairwise(errors):
        claims.append(at_least("error falls, for four times the samples, by the factor", before / after, "", 1.7))
    z = _bias(questions)
    claims.append(at_most("distance of the mean estimate from the exact bound", abs(z), "standard errors", 4.0))
    return claims


def _estimates(question: _Question, number: int, count: int, shared: bool) -> NDArray[np.float64]:
    """What `count` samples say of each option `[options]`."""
    import numpy as np

    masked = np.stack([_masked(number, 0 if shared else option, count, shared) for option in range(OPTIONS)])
    return question.samples(masked).mean(1)


@functools.cache
def _masked(number: int, option: int, count: int, shared: bool) -> NDArray[np.float64]:
    """Which positions of an option are masked in each sample: `[samples, length]` of 0 and 1."""
    import numpy as np

    from llada_megatron.llada_moe.evaluation.estimators import draw
    from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
    from llada_megatron.llada_moe.evaluation.queries import Pair, parts

    protocol = LikelihoodProtocol(samples=count, stratum=min(8, count), shared_masks=shared)
    pair = Pair((), (0,) * LENGTH, number, option)
    masked = np.zeros((count, LENGTH))
    for sample, positions in enumerate(itertools.chain.from_iterable(draw(parts(pair, None)[0], pair, 0, protocol))):
        masked[sample, list(positions)] = 1.0
    return masked


def _agreement(questions: Sequence[_Question], count: int, shared: bool) -> float:
    same = [
        int(_estimates(question, number, count, shared).argmax() == question.exact.argmax())
        for number, question in enumerate(questions)
    ]
    return sum(same) / len(same)


def _error(questions: Sequence[_Question], count: int) -> float:
    """Root mean square of the distance from the exact bound."""
    import numpy as np

    return float(np.sqrt(np.mean([(_estimates(q, n, count, True) - q.exact) ** 2 for n, q in enumerate(questions)])))


def _bias(questions: Sequence[_Question]) -> float:
    """Mean distance of one option's estimate from the exact bound, in its standard errors."""
    import numpy as np

    found = np.array([(_estimates(q, n, 8, True) - q.exact)[0] for n, q in enumerate(questions)])
    return float(found.mean() / (found.std(ddof=1) / np.sqrt(len(found))))
