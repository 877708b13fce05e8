"""A conversation with a model: the messages so far, and the next answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llada_megatron.parallel.sampling.chat_template import ChatTemplate
from llada_megatron.parallel.sampling.prompts import Prompt, require_text
from llada_megatron.parallel.sampling.sequence_view import SequenceView

if TYPE_CHECKING:
    from llada_megatron.llada_moe.data.tokenizer import Tokenizer
    from llada_megatron.parallel.sampling.results import Result
    from llada_megatron.parallel.sampling.sampler import SampledStep, Sampler


@dataclass
class AnswerStep:
    """One step in the sampling of an answer."""

    view: SequenceView
    """The conversation and the answer after the step."""
    first: int
    """Position at which the answer begins."""
    step: SampledStep


@dataclass
class Conversation:
    """The messages of a conversation, and the model that answers them."""

    sampler: Sampler
    template: ChatTemplate
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    """Results of all answers, also of those that `reset` has removed from the messages."""

    def __post_init__(self) -> None:
        self._end_of_turn = self.template.end_of_turn
        self.reset()

    def reset(self) -> None:
        """Forget all messages but the system's. Raises DataError if that is not UTF-8 text."""
        require_text(self.system or "", "the system's message")
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str) -> Iterator[AnswerStep]:
        """Answer a message, step by step. After the last step the message and its answer are in `messages`.

        Raises:
            ConfigError: the conversation no longer fits the model's context.
            DataError: the template cannot be run, or the message is not UTF-8 text.
        """
        require_text(text, "the message")
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.template.encode(messages)
        jobs = self.sampler.jobs_of([Prompt.of(ids, number=len(self.results) + 1)])
        view = SequenceView.of(jobs[0].request, self.sampler.tokenizer)
        for step in self.sampler.steps_of(jobs):
            view.apply(step)
            yield AnswerStep(view, len(ids), step)
            for result in step.finished:
                self.results.append(result)
                answer = answer_text(self.template.tokenizer, result, self._end_of_turn)
                self.messages = [*messages, {"role": "assistant", "content": answer}]


def answer_text(tokenizer: Tokenizer, result: Result, end_of_turn: int | None) -> str:
    """The text of an answer, up to the token that ends the assistant's turn (see `ChatTemplate.end_of_turn`)."""
    written = [token for run in result.written for token in run]
    if end_of_turn in written:
        written = written[: written.index(end_of_turn)]
    return tokenizer.decode(written).strip()
