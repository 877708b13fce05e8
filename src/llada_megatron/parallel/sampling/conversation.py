"""A conversation with a model: the messages so far, and the next answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llada_megatron.parallel.sampling.chat_template import ChatTemplate
from llada_megatron.parallel.sampling.prompts import Prompt, require_text
from llada_megatron.parallel.sampling.sequence_view import SequenceView

if TYPE_CHECKING:
    from llada_megatron.parallel.sampling.results import Result
    from llada_megatron.parallel.sampling.sampler import SampledStep, Sampler


@dataclass
class AnswerStep:
    """An answer while it is written."""

    picture: SequenceView
    first: int
    """Position at which it begins."""
    step: SampledStep


@dataclass
class Conversation:
    """Messages, and how they are put to the model."""

    sampler: Sampler
    template: ChatTemplate
    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    """Of the answers since the start, whatever was forgotten."""

    def __post_init__(self) -> None:
        self._end_of_turn = self.template.end_of_turn
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system's message. Raises DataError where that is not UTF-8 text."""
        require_text(self.system or "", "the system's message")
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def ask(self, text: str) -> Iterator[AnswerStep]:
        """Have a message answered, step by step; both are in `messages` once it is.

        Raises:
            ConfigError: the conversation does not fit the model's context any more.
            DataError: the template cannot be run, or the message is not UTF-8 text.
        """
        require_text(text, "the message")
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = self.template.encode(asked)
        jobs = self.sampler.jobs_of([Prompt.of(ids, number=len(self.results) + 1)])
        picture = SequenceView.of(jobs[0].draft, self.sampler.tokenizer)
        for step in self.sampler.steps_of(jobs):
            picture.apply(step)
            yield AnswerStep(picture, len(ids), step)
            for result in step.finished:
                self.results.append(result)
                self.messages = [*asked, {"role": "assistant", "content": self._answer(result)}]

    def _answer(self, result: Result) -> str:
        """The text of an answer up to the end of its turn."""
        written = [token for run in result.written for token in run]
        if self._end_of_turn in written:
            written = written[: written.index(self._end_of_turn)]
        return self.template.tokenizer.decode(written).strip()
