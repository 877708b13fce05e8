"""Filling spans of text with a diffusion model, and with an autoregressive one as the baseline (collective)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llada_megatron.llada_moe.evaluation.estimators import Estimate, estimate
from llada_megatron.llada_moe.evaluation.infill_spans import InfillSpan
from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
from llada_megatron.llada_moe.evaluation.queries import Pair
from llada_megatron.llada_moe.model.patterns import whole_sequences
from llada_megatron.llada_moe.sampling import draws
from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
from llada_megatron.parallel.evaluation.query_scorer import QueryScorer, kind_of
from llada_megatron.parallel.evaluation.served_model import ServedModel
from llada_megatron.parallel.sampling.prompts import Gap, Prompt

_AT_ONCE = 64
"""Texts that an autoregressive model continues together."""
RIGHT_SIDE = 32
"""Tokens behind a span that a filling is judged by."""


def span_costs(
    loaded: LoadedModel, spans: Sequence[InfillSpan], protocol: LikelihoodProtocol, sides: bool = True
) -> list[Estimate]:
    """The log-likelihood of what stood in each span, given both sides, or the left one only."""
    pairs = [Pair(span.before, span.truth, span.number, 0, span.after if sides else ()) for span in spans]
    fitted = [pair.fitted(loaded.run.model.max_sequence_length) for pair in pairs]
    return estimate(QueryScorer(loaded, protocol.guidance), fitted, protocol, kind_of(loaded))


def fill(served: ServedModel, spans: Sequence[InfillSpan], length: int | None = None) -> list[tuple[int, ...]]:
    """What the model writes into each span, of the true length or of another."""
    prompts = [
        Prompt(tuple(p for p in (s.before, Gap(length or len(s.truth)), s.after) if p != ()), number=s.number + 1)
        for s in spans
    ]
    return [tuple(token for run in result.written for token in run) for result in served.generate(prompts)]


def length_found(
    served: ServedModel, spans: Sequence[InfillSpan], lengths: Sequence[int], protocol: LikelihoodProtocol
) -> list[tuple[int, tuple[int, ...]]]:
    """For each span the length, of `lengths`, whose filling makes the text most likely, and that filling.

    Every length is filled, and the log-likelihood of the filling together with the tokens behind it is compared: these
    are different strings, of which one is the most likely, whatever their lengths. A text that is too long for the
    model with the longest filling is cut at its ends, alike for all lengths.
    """
    room = served.loaded.run.model.max_sequence_length - max(lengths)
    spans = [_fitted(span, room + len(span.truth)) for span in spans]
    best: list[tuple[float, int, tuple[int, ...]]] = [(-torch.inf, 0, ())] * len(spans)
    for length in lengths:
        written = fill(served, spans, length)
        pairs = [
            Pair(span.before, (*new, *span.after[:RIGHT_SIDE]), span.number)
            for span, new in zip(spans, written, strict=True)
        ]
        found = estimate(QueryScorer(served.loaded, protocol.guidance), pairs, protocol, served.kind)
        for i, (each, new) in enumerate(zip(found, written, strict=True)):
            best[i] = max(best[i], (each.nats, length, new))
    return [(length, new) for _, length, new in best]


def _fitted(span: InfillSpan, longest: int) -> InfillSpan:
    """The span in a text of at most `longest` tokens."""
    cut = Pair(span.before, span.truth, after=span.after).fitted(longest)
    start = len(cut.context)
    return InfillSpan((*cut.context, *cut.answer, *cut.after), start, start + len(cut.answer), span.number)


def continue_left_to_right(
    loaded: LoadedModel,
    spans: Sequence[InfillSpan],
    temperature: float,
    seed: int,
    draw: int = 0,
    length: int | None = None,
) -> list[tuple[int, ...]]:
    """What an autoregressive model writes behind the text before each span, as many tokens as the span has.

    Every step runs the whole text: spans are short, and this is a baseline. Of a text that is too long for the model
    with them the end is read. `length`: as many tokens for all.
    """
    written: list[tuple[int, ...]] = []
    for start in range(0, len(spans), _AT_ONCE):
        written += _continued(loaded, spans[start : start + _AT_ONCE], temperature, seed, draw, length)
    return written


def _continued(
    loaded: LoadedModel,
    spans: Sequence[InfillSpan],
    temperature: float,
    seed: int,
    draw: int,
    length: int | None,
) -> list[tuple[int, ...]]:
    model = loaded.run.model
    wanted = [length or len(span.truth) for span in spans]
    rooms = [model.max_sequence_length - count for count in wanted]
    texts = [
        list(span.before[max(0, len(span.before) - room) :]) or [model.eos_token_id]
        for span, room in zip(spans, rooms, strict=True)
    ]
    starts = [len(text) for text in texts]
    numbers = torch.tensor([span.number for span in spans])
    excluded = [model.mask_token_id, model.eos_token_id]
    for step in range(max(wanted)):
        longest = max(map(len, texts))
        tokens, rows = torch.full((len(texts), longest), model.eos_token_id), torch.zeros(len(texts), longest).bool()
        for i, text in enumerate(texts):
            tokens[i, : len(text)] = torch.tensor(text)
            rows[i, len(text) - 1] = True
        logits = loaded.logits(tokens, rows, whole_sequences(*tokens.shape)).double()
        logits[:, excluded] = -torch.inf
        if temperature:
            ids = torch.arange(logits.shape[1])
            logits += temperature * draws.gumbel(
                seed, draws.TOKEN, numbers[:, None], torch.tensor(draw), torch.tensor(step), ids
            )
        for text, token in zip(texts, logits.argmax(1).tolist(), strict=True):
            text.append(token)
    return [tuple(text[at : at + n]) for text, at, n in zip(texts, starts, wanted, strict=True)]


def reranked(
    loaded: LoadedModel, spans: Sequence[InfillSpan], candidates: Sequence[Sequence[tuple[int, ...]]]
) -> list[tuple[int, ...]]:
    """Of several fillings of each span the one that makes filling and right side together most likely."""
    protocol = LikelihoodProtocol("next-token")
    longest, eos = loaded.run.model.max_sequence_length, loaded.run.model.eos_token_id
    pairs = [
        Pair(span.before or (eos,), (*new, *span.after[:RIGHT_SIDE]), span.number, option).fitted(longest)
        for span, options in zip(spans, candidates, strict=True)
        for option, new in enumerate(options)
    ]
    found = iter(estimate(QueryScorer(loaded), pairs, protocol, kind_of(loaded)))
    chosen = []
    for options in candidates:
        nats = [next(found).nats for _ in options]
        chosen.append(tuple(options[max(range(len(options)), key=nats.__getitem__)]))
    return chosen
