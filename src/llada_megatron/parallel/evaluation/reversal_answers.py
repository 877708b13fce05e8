"""What a trained model answers to the questions of the reversal benchmark, and how likely the right answers are to it.

A diffusion model fills the answer in, a token a pass, the surest first, and so it answers also what stands before the
text that is given. An autoregressive model continues what stands before the answer; where the first part of a trained
sentence is asked, every name is put there, and the one that makes the sentence most likely is its answer. Both are
given the true number of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from llada_megatron.llada_moe.data.tokenizer import Tokenizer
from llada_megatron.llada_moe.evaluation.infill_spans import InfillSpan
from llada_megatron.llada_moe.evaluation.protocol import LikelihoodProtocol
from llada_megatron.llada_moe.evaluation.queries import Pair
from llada_megatron.llada_moe.evaluation.reversal_facts import Question, ReversalFacts, shuffled
from llada_megatron.parallel.checkpoint.loaded_model import LoadedModel
from llada_megatron.parallel.evaluation.infill_run import continue_left_to_right, fill
from llada_megatron.parallel.evaluation.served_model import ServedModel
from llada_megatron.parallel.sampling.settings import Settings

_AT_ONCE = 64
"""Questions that are answered together."""
_MASKS = LikelihoodProtocol(samples=8, stratum=8)
"""Of the bound of a name, which has two tokens: samples mask one of them or both, and equal ones are run once."""


@dataclass(frozen=True)
class Answer:
    """One answer, and what it is graded by."""

    fact: int
    """Number of the fact that was asked for."""
    ask: str
    about: str
    written: str
    right: bool
    shuffled: bool
    """Whether it is right for another fact, drawn at random, of which the same is asked: what a guess would hit."""
    known: bool
    """Whether any fact has this answer; a name that none has is put together of parts of others."""
    margin: float | None
    """Log-likelihood of the right name less that of the other fact's, in nats; None where a description is asked."""

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


class ReversalAnswers:
    """Asks one loaded model (collective)."""

    def __init__(self, loaded: LoadedModel, facts: ReversalFacts, length: int, seed: int) -> None:
        """Raises DataError: the tokenizer of the checkpoint is missing.

        Args:
            loaded: the model.
            facts: what it was trained on.
            length: tokens of every training sentence, filled up with end-of-text tokens.
            seed: of the other facts that right answers are compared with.
        """
        self._loaded, self._facts, self._length = loaded, facts, length
        settings = Settings(checkpoint=str(loaded.path), batch_size=_AT_ONCE)
        self._served = ServedModel(loaded, _MASKS, settings, driven=False)
        self._questions = facts.questions()
        self._spans = [self._span(number, question) for number, question in enumerate(self._questions)]
        self._others = self._drawn(seed)

    def all(self) -> list[Answer]:
        """The answers to all questions."""
        written = self._filled() if self._served.kind.fills_masks else self._continued()
        margins = self._margins()
        return [self._graded(number, written[number], margins.get(number)) for number in range(len(self._questions))]

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._served.tokenizer

    def _span(self, number: int, question: Question) -> InfillSpan:
        before, answer, after = (tuple(self._tokenizer.encode(text)) for text in question.parts(self._facts.facts))
        text = (*before, *answer, *after)
        text += (self._loaded.run.model.eos_token_id,) * (self._length - len(text))
        return InfillSpan(text, len(before), len(before) + len(answer), number)

    def _drawn(self, seed: int) -> list[int]:
        """For each question another fact of those that are asked the same."""
        same: dict[tuple[str, str], list[int]] = {}
        for question in self._questions:
            facts = same.setdefault((question.ask, question.about), [])
            if question.fact not in facts:
                facts.append(question.fact)
        other = {key: shuffled(numbers, seed) for key, numbers in same.items()}
        return [other[question.ask, question.about][question.fact] for question in self._questions]

    def _filled(self) -> list[tuple[int, ...]]:
        return fill(self._served, self._spans)

    def _continued(self) -> list[tuple[int, ...]]:
        """Continuations, and of the questions that ask in place the likeliest of all names."""
        ahead = [span for span in self._spans if self._questions[span.number].ask != "in place"]
        found = dict(zip((span.number for span in ahead), self._greedy(ahead), strict=True))
        names = [tuple(self._tokenizer.encode(fact.name)) for fact in self._facts.facts]
        ranked = [span for span in self._spans if self._questions[span.number].ask == "in place"]
        pairs = [self._pair(span, name, option) for span in ranked for option, name in enumerate(names)]
        nats = [each.nats for each in self._served.log_likelihoods(pairs)]
        for place, span in enumerate(ranked):
            own = nats[place * len(names) : (place + 1) * len(names)]
            found[span.number] = names[max(range(len(names)), key=own.__getitem__)]
        return [found[number] for number in range(len(self._spans))]

    def _greedy(self, spans: Sequence[InfillSpan]) -> list[tuple[int, ...]]:
        return continue_left_to_right(self._loaded, spans, temperature=0.0, seed=0)

    def _pair(self, span: InfillSpan, answer: tuple[int, ...], option: int) -> Pair:
        """An answer whose likelihood is asked for; one by next tokens goes on to the end of the sentence."""
        if not self._served.kind.predicts_next:
            return Pair(span.before, answer, span.number, option, span.after)
        context = span.before or (self._loaded.run.model.eos_token_id,)
        return Pair(context, (*answer, *self._sentence_end(span)), span.number, option)

    def _sentence_end(self, span: InfillSpan) -> tuple[int, ...]:
        """What stands behind an answer, without end-of-text tokens."""
        return tuple(token for token in span.after if token != self._loaded.run.model.eos_token_id)

    def _margins(self) -> dict[int, float]:
        asked = [span for span in self._spans if self._questions[span.number].about == "name"]
        pairs = []
        for span in asked:
            other = self._facts.facts[self._others[span.number]].name
            pairs += [self._pair(span, span.truth, 0), self._pair(span, tuple(self._tokenizer.encode(other)), 1)]
        found = self._served.log_likelihoods(pairs)
        return {span.number: found[2 * i].nats - found[2 * i + 1].nats for i, span in enumerate(asked)}

    def _graded(self, number: int, written: tuple[int, ...], margin: float | None) -> Answer:
        question, facts = self._questions[number], self._facts.facts
        text = self._tokenizer.decode(list(written))
        answers = [fact.name if question.about == "name" else fact.description for fact in facts]
        return Answer(
            fact=question.fact,
            ask=question.ask,
            about=question.about,
            written=text,
            right=text == answers[question.fact],
            shuffled=text == answers[self._others[number]],
            known=text in answers,
            margin=margin,
        )
