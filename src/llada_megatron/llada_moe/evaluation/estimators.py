"""Log-likelihood of an answer under a masked diffusion model, estimated in the ways that are published.

The bound is that of LLaDA (arXiv 2502.09992, eq. 6) with the number of masked tokens drawn, not their probability: a
quarter of the variance, and no weight without limit. It equals the mean, over all orders, of the log-likelihood of a
decoder that unmasks one token after the other. The chain in order of confidence is one such order, which the answer
itself has a part in choosing. Of a block-causal model every estimate is a sum over blocks, earlier blocks clean.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
from llada_megatron.llada_moe.evaluation.queries import (
    AnswerPart,
    ModelKind,
    Pair,
    PartQuery,
    Query,
    Score,
    ask,
    next_token_query,
    parts,
)
from llada_megatron.llada_moe.sampling import draws

_OPTIONS = 1 << 20
"""More options than a question has."""


@dataclass(frozen=True)
class Estimate:
    """The log-likelihood of an answer, or what a protocol takes for it."""

    nats: float
    """At most 0."""
    standard_error: float | None
    """In nats; 0 where nothing was drawn, None where one stratum alone cannot tell."""
    tokens: int
    """Of the answer."""
    queries: int
    """Texts that the model was run on, without the second copies of guidance."""
    strata: tuple[float, ...] = ()
    """What each stratum says, in nats: under shared masks strata of two options may be subtracted one by one."""


@dataclass(frozen=True)
class WeightedQuery:
    """A query of which the sum of the log-probabilities counts `weight` times in an estimate."""

    query: Query
    weight: float


def estimate(score: Score, pairs: Sequence[Pair], protocol: LikelihoodProtocol, model: ModelKind) -> list[Estimate]:
    """The log-likelihood of each pair's answer.

    Raises:
        ConfigError: the protocol is not one of this model.
        DataError: an autoregressive model was given an empty context.
    """
    protocol = protocol.of_model(model.fills_masks, model.verifies)
    if protocol.estimator == "next-token":
        return _next_token(score, pairs)
    cut = [parts(pair, model.block, model.verifies) for pair in pairs]
    if protocol.estimator == "confidence":
        return _in_order_of_confidence(score, pairs, cut, model.mask_id)
    if protocol.estimator == "left-to-right":
        return _from_left_to_right(score, pairs, cut, model.mask_id)
    return _bound(score, pairs, cut, protocol, model.mask_id)


def bound_queries(pair: Pair, protocol: LikelihoodProtocol, model: ModelKind) -> list[WeightedQuery]:
    """The queries whose weighted sum is the estimate of the bound, for losses that differentiate it."""
    found = []
    cut = parts(pair, model.block, model.verifies)
    for number, part in enumerate(cut):
        strata = draw(part, pair, number, protocol)
        count = sum(map(len, strata))
        drawn = Counter(masked for stratum in strata for masked in stratum)
        for masked, times in drawn.items():
            weight = times * part.length / len(masked) / count
            (asked,) = ask(cut, {number: masked}, model.mask_id)
            found.append(WeightedQuery(asked.query, weight))
    return found


def draw(part: AnswerPart, pair: Pair, number: int, protocol: LikelihoodProtocol) -> list[list[tuple[int, ...]]]:
    """Masked positions of each sample, by strata: a pure function of the seed, the question and the part's number.

    Within a stratum of b samples the numbers of masked tokens are k + j L / b, j = 0..b - 1, rounded down, and begun
    anew after L, with one k drawn from 1..L: each alone is uniform on 1..L. (Rounded to the nearest even number, as
    published, it would not be where L / b is half a number.) One position is masked in every sample: one is enough.
    """
    length = part.length
    if length == 1:
        return [[(part.first,)]]
    shared = protocol.shared_masks and not pair.window
    name = pair.question if shared else pair.question * _OPTIONS + pair.option + 1
    question, block = torch.tensor(name), torch.tensor(number)
    size, count = protocol.stratum, protocol.samples // protocol.stratum
    uniform = draws.uniform(protocol.seed, draws.MASK_COUNT, question, block, torch.arange(count))
    starts = (uniform * length).long().clamp(max=length - 1)
    counts = (starts[:, None] + torch.arange(size) * length // size) % length + 1
    samples = torch.arange(count * size)[:, None]
    keys = draws.uniform(protocol.seed, draws.MASK_PLACE, question, block, samples, torch.arange(length))
    order = (keys.argsort(1) + part.first).view(count, size, length)
    return [
        [tuple(sorted(row[:masked].tolist())) for row, masked in zip(rows, of_rows, strict=True)]
        for rows, of_rows in zip(order, counts.tolist(), strict=True)
    ]


def greedy(score: Score, pairs: Sequence[Pair], model: ModelKind) -> list[bool]:
    """Whether a decoder that unmasks the most confident position first writes exactly the answer, L queries each.

    A model that predicts the next token decodes from left to right, in one query. A tie of two tokens counts for the
    answer.
    """
    if model.predicts_next:
        found = score([next_token_query(pair) for pair in pairs])
        return [bool((rows[:, 0] >= rows[:, 1]).all()) for rows in found]
    cut = [parts(pair, model.block) for pair in pairs]
    opened = [{b: list(range(part.first, part.stop)) for b, part in enumerate(own)} for own in cut]
    right = [True] * len(pairs)
    while asked := _of_round(cut, opened, model.mask_id):
        for p, b, _, values in _answers(score, asked):
            chosen = int(values[:, 1].argmax())
            right[p] &= bool(values[chosen, 0] >= values[chosen, 1])
            del opened[p][b][chosen]
        opened = [positions if right[p] else {} for p, positions in enumerate(opened)]
    return right


def _next_token(score: Score, pairs: Sequence[Pair]) -> list[Estimate]:
    asked = [pair for pair in pairs if pair.answer]
    answers = iter(score([next_token_query(pair) for pair in asked]))
    return [_exact(_sum(next(answers)), pair, 1) if pair.answer else _exact(0.0, pair, 0) for pair in pairs]


def _bound(
    score: Score,
    pairs: Sequence[Pair],
    cut: Sequence[Sequence[AnswerPart]],
    protocol: LikelihoodProtocol,
    mask_id: int,
) -> list[Estimate]:
    """Equal masks of a part are run once, however often they were drawn: a short answer has few."""
    drawn = [
        [draw(part, pair, b, protocol) for b, part in enumerate(own)] for pair, own in zip(pairs, cut, strict=True)
    ]
    asked: list[tuple[int, PartQuery]] = []
    for p, own in enumerate(cut):
        asked += [(p, each) for each in _of_samples(own, drawn[p], mask_id)]
    sums: dict[tuple[int, int, tuple[int, ...]], float] = {}
    for p, b, rows, values in _answers(score, asked):
        sums[p, b, rows] = _sum(values)

    def of_part(p: int, b: int) -> list[float]:
        length = cut[p][b].length
        return [
            sum(length / len(masked) * sums[p, b, masked] for masked in stratum) / len(stratum)
            for stratum in drawn[p][b]
        ]

    run = Counter(p for p, _ in asked)
    return [_joined(own, [of_part(p, b) for b in range(len(own))], pairs[p], run[p]) for p, own in enumerate(cut)]


def _of_samples(
    own: Sequence[AnswerPart], drawn: Sequence[Sequence[Sequence[tuple[int, ...]]]], mask_id: int
) -> Iterator[PartQuery]:
    """The queries of one answer, sample by sample, without those parts that had the same masks before."""
    samples = [list(chain.from_iterable(strata)) for strata in drawn]
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for sample in range(max(map(len, samples), default=0)):
        new = {
            b: each[sample] for b, each in enumerate(samples) if sample < len(each) and (b, each[sample]) not in seen
        }
        seen |= set(new.items())
        yield from ask(own, new, mask_id)


def _answers(
    score: Score, asked: Sequence[tuple[int, PartQuery]]
) -> Iterator[tuple[int, int, tuple[int, ...], Tensor]]:
    """Number of the pair and of the part, the rows of the text, and what the model says of them `[rows, 2]`."""
    for (p, each), values in zip(asked, score([each.query for _, each in asked]), strict=True):
        at = 0
        for b, count in zip(each.parts, each.counts, strict=True):
            yield p, b, each.query.rows[at : at + count], values[at : at + count]
            at += count


def _joined(own: Sequence[AnswerPart], found: Sequence[Sequence[float]], pair: Pair, queries: int) -> Estimate:
    """The sum over parts, each given by what its strata say; a part of one position is exact and has one of them."""
    count = max(map(len, found), default=1)
    spread = [strata if len(strata) == count else [strata[0]] * count for strata in found]
    strata = tuple(map(math.fsum, zip(*spread, strict=True))) if found else (0.0,)
    error: float | None = 0.0
    if any(part.length > 1 for part in own):
        error = None if count == 1 else statistics.stdev(strata) / math.sqrt(count)
    return Estimate(math.fsum(strata) / count, error, len(pair.answer), queries, strata)


def _in_order_of_confidence(
    score: Score, pairs: Sequence[Pair], cut: Sequence[Sequence[AnswerPart]], mask_id: int
) -> list[Estimate]:
    """All parts of all answers advance together by one token a round, so that a round is one batch."""
    opened = [{b: list(range(part.first, part.stop)) for b, part in enumerate(own)} for own in cut]
    totals, run = [0.0] * len(pairs), Counter[int]()
    while asked := _of_round(cut, opened, mask_id):
        run.update(p for p, _ in asked)
        for p, b, _, values in _answers(score, asked):
            surest = int(values[:, 0].argmax())
            totals[p] += float(values[surest, 0])
            del opened[p][b][surest]
    return [_exact(total, pair, run[p]) for p, (total, pair) in enumerate(zip(totals, pairs, strict=True))]


def _of_round(
    cut: Sequence[Sequence[AnswerPart]], opened: Sequence[dict[int, list[int]]], mask_id: int
) -> list[tuple[int, PartQuery]]:
    """Queries about all that is still masked, with the number of the pair of each."""
    return [
        (p, each)
        for p, (own, positions) in enumerate(zip(cut, opened, strict=True))
        for each in ask(own, {b: masked for b, masked in positions.items() if masked}, mask_id)
    ]


def _from_left_to_right(
    score: Score, pairs: Sequence[Pair], cut: Sequence[Sequence[AnswerPart]], mask_id: int
) -> list[Estimate]:
    asked: list[tuple[int, PartQuery]] = []
    for p, own in enumerate(cut):
        for step in range(max((part.length for part in own), default=0)):
            masked = {b: range(x.first + step, x.stop) for b, x in enumerate(own) if step < x.length}
            asked += [(p, each) for each in ask(own, masked, mask_id, {b: [m[0]] for b, m in masked.items()})]
    totals, run = [0.0] * len(pairs), Counter(p for p, _ in asked)
    for p, _, _, values in _answers(score, asked):
        totals[p] += _sum(values)
    return [_exact(total, pair, run[p]) for p, (total, pair) in enumerate(zip(totals, pairs, strict=True))]


def _exact(nats: float, pair: Pair, queries: int) -> Estimate:
    return Estimate(nats, 0.0, len(pair.answer), queries, (nats,))


def _sum(rows: Tensor) -> float:
    return float(rows[:, 0].sum())
