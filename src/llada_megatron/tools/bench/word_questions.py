"""How a model fine-tuned on `generated-chats` answers questions about words that its conversations do not speak of."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llada_megatron.llada_moe.data.generated_chats import Question, in_format, new_questions
from llada_megatron.llada_moe.errors import ConfigError

if TYPE_CHECKING:
    from llada_megatron.parallel.sampling.sampler import Sampler

NEW_TOKENS, BATCH_SIZE = 32, 50
"""Positions of an answer, which are one block, and questions that run together."""


@dataclass(frozen=True)
class Answers:
    """Counts over questions."""

    questions: int
    in_format: int
    """Answers that are written as those of the training: "Answer: ", one word, a full stop, and nothing else."""
    right: int
    """Answers that are also right."""
    tokens: int
    """Tokens of the answers, without those that end a turn or a text."""
    forwards: int
    """Forward passes of the answers; those of a question are counted as if it ran alone."""
    wrong_format: tuple[str, ...]
    """Answers that are not in the format."""

    @property
    def accuracy(self) -> float:
        """Share of the answers that are right."""
        return self.right / self.questions

    @property
    def tokens_per_forward(self) -> float:
        """Tokens of an answer per forward pass, over all answers."""
        return self.tokens / max(1, self.forwards)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Which model, and how many questions."""
    parser.add_argument(
        "model", nargs="?", default="runs/small-chat", help="the run, or a step of it (default: runs/small-chat)"
    )
    parser.add_argument("--questions", type=int, default=200, metavar="N", help="how many are asked (default 200)")


def questions_of(args: argparse.Namespace) -> list[Question]:
    """The questions. Raises ConfigError."""
    if args.questions < 1:
        raise ConfigError(f"--questions {args.questions}: at least 1")
    return new_questions(args.questions)


def protocol(count: int, method: str) -> str:
    """What the figures are figures of, in one line."""
    return (
        f"{count} questions about words that are in no conversation of generated-chats, each the first message of a "
        f"conversation, asked by the template of the checkpoint; {method}; temperature 0; {NEW_TOKENS} positions in "
        "one block; an answer is in the format if all of it is 'Answer: ', one word and a full stop"
    )


def ask(checkpoint: Path | str, questions: Sequence[Question], schedules: Sequence[dict[str, str]]) -> list[Answers]:
    """The answers of a checkpoint by each schedule, given as its name and its settings.

    Raises:
        ConfigError: the model cannot be sampled from.
        CheckpointError, DataError: there is no checkpoint, or no tokenizer or chat template with it.
    """
    from llada_megatron.llada_moe.config.layout import LayoutConfig
    from llada_megatron.parallel import device

    device.install()  # before the first import of megatron.core in this process, as everywhere
    from llada_megatron.parallel.checkpoint.loaded_model import load_checkpoint
    from llada_megatron.parallel.sampling.sampler import Sampler
    from llada_megatron.parallel.sampling.settings import Settings
    from llada_megatron.tools.bench.measurement import single_process

    found = []
    with single_process():
        loaded = load_checkpoint(checkpoint, LayoutConfig())
        for schedule in schedules:
            settings = Settings(
                checkpoint=str(checkpoint),
                schedule=schedule["name"],
                overrides={f"schedule.{key}": value for key, value in schedule.items() if key != "name"},
                block_length=NEW_TOKENS,
                max_new_tokens=NEW_TOKENS,
                batch_size=BATCH_SIZE,
            )
            found.append(_answers(Sampler(loaded, settings), questions))
    return found


def _answers(sampler: Sampler, questions: Sequence[Question]) -> Answers:
    from llada_megatron.parallel.sampling.chat_template import find_template
    from llada_megatron.parallel.sampling.conversation import answer_text

    template = find_template(sampler.session.require_tokenizer(), None)
    end = template.end_of_turn
    results = sampler.generate([template.encode([{"role": "user", "content": each.text}]) for each in questions])
    texts = [answer_text(template.tokenizer, result, end) for result in results]
    tokens = [[token for run in result.written for token in run] for result in results]
    return Answers(
        questions=len(questions),
        in_format=sum(map(in_format, texts)),
        right=sum(text == question.answer for text, question in zip(texts, questions, strict=True)),
        tokens=sum(written.index(end) if end in written else len(written) for written in tokens),
        forwards=sum(result.forwards for result in results),
        wrong_format=tuple(text for text in texts if not in_format(text)),
    )
